"""What each op is defined for: every function here returns why it is not, as text, or None.

Symbolic sizes are refused only where they are known to differ: asking more of them would install guards.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

NUMERICS = ("fp32", "eager")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def known_to_differ(m: int, n: int) -> bool:
    """Whether two sizes differ for certain; of symbolic ones without installing a guard."""
    if type(m) is int and type(n) is int:
        return m != n
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(m != n)


def shapes_differ(m: Sequence[int], n: Sequence[int]) -> bool:
    return len(m) != len(n) or any(map(known_to_differ, m, n))


def listed(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def kind_problem(named: dict[str, Tensor]) -> str | None:
    """Why the tensors are not all of one allowed dtype and on one device."""
    first_name, first = next(iter(named.items()))
    for name, tensor in named.items():
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}, allowed: bfloat16, float16 or float32"
        if tensor.dtype != first.dtype:
            return f"{name} is {tensor.dtype}, allowed: {first.dtype} as {first_name}"
        if tensor.device != first.device:
            return f"{name} is on {tensor.device}, allowed: {first.device} as {first_name}"
    return None


def gated_add_problem(a: Tensor, gate: Tensor, b: Tensor, numerics: str) -> str | None:
    problem = kind_problem({"a": a, "gate": gate, "b": b})
    if problem is not None:
        return problem
    if not (a.dim() and gate.dim()):
        return f"{'gate' if a.dim() else 'a'} has no dims, allowed: one or more"
    if shapes_differ(a.shape, b.shape):
        return f"b is {listed(b.shape)}, allowed: {listed(a.shape)} as a"
    pairs = zip(reversed(gate.shape), reversed(a.shape), strict=False)
    if gate.dim() > a.dim() or any(known_to_differ(n, 1) and known_to_differ(n, m) for n, m in pairs):
        return f"gate is {listed(gate.shape)}, allowed: any shape that broadcasts to {listed(a.shape)} as a"
    if numerics not in NUMERICS:
        return f"numerics is {numerics!r}, allowed: {', '.join(map(repr, NUMERICS))}"
    return None


def gate_projected_add_problem(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> str | None:
    named = {"x": x, "weight": weight, "a": a, "b": b}
    problem = kind_problem(named if bias is None else named | {"bias": bias})
    if problem is not None:
        return problem
    if not (x.dim() and a.dim()):
        return f"{'a' if x.dim() else 'x'} has no dims, allowed: one or more"
    if shapes_differ(a.shape, b.shape):
        return f"b is {listed(b.shape)}, allowed: {listed(a.shape)} as a"
    if known_to_differ(prod(x.shape[:-1]), prod(a.shape[:-1])):
        return f"x is {listed(x.shape)}, allowed: as many rows as a, which is {listed(a.shape)}"
    k = x.shape[-1]
    if all(shapes_differ(weight.shape, allowed) for allowed in ((1, k), (k, 1), (k,))):
        return f"weight is {listed(weight.shape)}, allowed: [1, {k}], [{k}, 1] or [{k}]"
    if bias is not None and known_to_differ(bias.numel(), 1):
        return f"bias is {listed(bias.shape)}, allowed: one element or None"
    return None


# As the registered ops tell it: RuntimeError, as ATen's own ops raise.


def check_gated_add(a: Tensor, gate: Tensor, b: Tensor, numerics: str) -> None:
    problem = gated_add_problem(a, gate, b, numerics)
    if problem is not None:
        raise RuntimeError(f"fusionpass::gated_add: {problem}")


def check_gate_projected_add(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> None:
    problem = gate_projected_add_problem(x, weight, bias, a, b)
    if problem is not None:
        raise RuntimeError(f"fusionpass::gate_projected_add: {problem}")
