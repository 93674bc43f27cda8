"""What each op is defined for: every function here returns why it is not, as text, or None.

Symbolic sizes are refused only where they are known to differ: asking more of them would install guards.
"""

from __future__ import annotations

import functools
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


def known_outside(n: int, least: int, most: int) -> bool:
    """Whether a size is outside the limits for certain."""
    if type(n) is int:
        return not least <= n <= most
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(n < least) or statically_known_true(n > most)


def shapes_differ(m: Sequence[int], n: Sequence[int]) -> bool:
    return len(m) != len(n) or any(map(known_to_differ, m, n))


def listed(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def promoted(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that eager's type promotion gives an expression of these tensors, each of one dim or more."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    return dtypes.pop() if len(dtypes) == 1 else functools.reduce(torch.promote_types, dtypes)


def result_dtype(dtype: torch.dtype | None, *tensors: Tensor | None) -> torch.dtype:
    """The dtype of an op's result: the one asked for, else what promotion gives."""
    return promoted(*tensors) if dtype is None else dtype


def combined_dtype(
    dtype: torch.dtype | None, a: Tensor, b: Tensor, gate: Tensor | None, x: Tensor | None, residual: Tensor | None
) -> torch.dtype:
    """The dtype of both results of moe_combine. Neither the routing weights nor the norm's take part in promotion: they are
    often kept in float32 beside rows of 16 bits, and the results are what the rows are."""
    return result_dtype(dtype, a, b, gate, x, residual)


def kind_problem(named: dict[str, Tensor], dtype: torch.dtype | None = None) -> str | None:
    """Why the tensors are not all dense, of allowed dtypes and on one device, or the dtype asked for is not allowed."""
    first_name, first = next(iter(named.items()))
    for name, tensor in named.items():
        if tensor.layout != torch.strided:
            return f"{name} has layout {tensor.layout}, allowed: torch.strided"
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}, allowed: bfloat16, float16 or float32"
        if tensor.device != first.device:
            return f"{name} is on {tensor.device}, allowed: {first.device} as {first_name}"
    if dtype is not None and dtype not in DTYPES:
        return f"dtype is {dtype}, allowed: bfloat16, float16 or float32"
    return None


def one_dtype_problem(named: dict[str, Tensor]) -> str | None:
    """Why the tensors are not all of one dtype."""
    first_name, first = next(iter(named.items()))
    for name, tensor in named.items():
        if tensor.dtype != first.dtype:
            return f"{name} is {tensor.dtype}, allowed: {first.dtype} as {first_name}"
    return None


def gated_add_problem(
    a: Tensor, gate: Tensor, b: Tensor, numerics: str, dtype: torch.dtype | None = None
) -> str | None:
    problem = kind_problem({"a": a, "gate": gate, "b": b}, dtype)
    if problem is None and numerics == "eager":
        problem = one_dtype_problem({"a": a, "gate": gate, "b": b})
        if problem is None and dtype not in (None, a.dtype):
            problem = f"dtype is {dtype}, allowed: {a.dtype} as a"
        problem = problem and f"{problem} where numerics is 'eager'"
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


def gate_projected_add_problem(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype | None = None
) -> str | None:
    projection = {"x": x, "weight": weight} if bias is None else {"x": x, "weight": weight, "bias": bias}
    problem = kind_problem(projection | {"a": a, "b": b}, dtype) or one_dtype_problem(projection)
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


MOST_TOP_K = 32  # terms of a row's sum that one program adds up
MOST_COLUMNS = 16384  # of a row that one program holds


def moe_combine_problem(
    named: dict[str, Tensor | None],
    top_k: int,
    permuted: bool,
    eps: float | None,
    dtype: torch.dtype | None = None,
) -> str | None:
    given = {name: tensor for name, tensor in named.items() if tensor is not None}
    for name in ("b", "a", "x", "residual"):
        if name in given and given[name].dim() == 0:
            return f"{name} has no dims, allowed: one or more"
    b, h = given["b"], given["b"].shape[-1]
    floating = {"b": b} | {name: t for name, t in given.items() if name not in ("inverse", "masked")}
    projection = {name: given[name] for name in ("x", "gate_weight", "gate_bias") if name in given}
    problem = kind_problem(floating, dtype) or (one_dtype_problem(projection) if projection else None)
    if problem is not None:
        return problem
    if "inverse" in given and given["inverse"].dtype not in (torch.int32, torch.int64):
        return f"inverse is {given['inverse'].dtype}, allowed: torch.int32 or torch.int64"
    if "masked" in given and given["masked"].dtype != torch.bool:
        return f"masked is {given['masked'].dtype}, allowed: torch.bool"
    for name, tensor in given.items():
        if tensor.device != b.device:
            return f"{name} is on {tensor.device}, allowed: {b.device} as b"
    if known_outside(h, 1, MOST_COLUMNS):
        return f"b has {h} columns, allowed: 1 to {MOST_COLUMNS}"
    if not 0 <= top_k <= MOST_TOP_K or (top_k > 0) != ("topk_weights" in given):
        return f"top_k is {top_k}, allowed: 1 to {MOST_TOP_K} with topk_weights, 0 without"
    if ("inverse" in given or "masked" in given or permuted) and not top_k:
        return "inverse, masked or permuted is given and top_k is 0, allowed: with topk_weights"
    if permuted and "inverse" not in given:
        return "permuted is True, allowed: with inverse"
    if ("gate" in given) == ("x" in given) or ("x" in given) != ("gate_weight" in given):
        return "allowed: either gate, or x and gate_weight"
    if "gate_bias" in given and "x" not in given:
        return "gate_bias is given without x"
    rows = prod(b.shape[:-1])
    slots = rows * top_k
    sizes = {
        "a": slots * h if top_k else rows * h,
        "topk_weights": slots,
        "inverse": slots,
        "masked": slots,
        "gate": rows,
    }
    sizes |= {"residual": rows * h, "norm_weight": h, "gate_bias": 1}
    for name, size in sizes.items():
        if name in given and known_to_differ(given[name].numel(), size):
            return f"{name} is {listed(given[name].shape)}, allowed: {size} elements for b {listed(b.shape)}"
    for name in ("a", "residual"):
        if name in given and known_to_differ(given[name].shape[-1], h):
            return f"{name} is {listed(given[name].shape)}, allowed: {h} columns as b"
    if "x" in given:
        x, weight = given["x"], given["gate_weight"]
        if known_to_differ(prod(x.shape[:-1]), rows):
            return f"x is {listed(x.shape)}, allowed: as many rows as b, which is {listed(b.shape)}"
        k = x.shape[-1]
        if all(shapes_differ(weight.shape, allowed) for allowed in ((1, k), (k, 1), (k,))):
            return f"gate_weight is {listed(weight.shape)}, allowed: [1, {k}], [{k}, 1] or [{k}]"
    if eps is None and "norm_weight" in given:
        return "norm_weight is given without eps"
    return None


# As the registered ops tell it: RuntimeError, as ATen's own ops raise.


def check_gated_add(a: Tensor, gate: Tensor, b: Tensor, numerics: str, dtype: torch.dtype | None = None) -> None:
    problem = gated_add_problem(a, gate, b, numerics, dtype)
    if problem is not None:
        raise RuntimeError(f"fusionpass::gated_add: {problem}")


def check_gate_projected_add(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype | None = None
) -> None:
    problem = gate_projected_add_problem(x, weight, bias, a, b, dtype)
    if problem is not None:
        raise RuntimeError(f"fusionpass::gate_projected_add: {problem}")


def check_moe_combine(
    named: dict[str, Tensor | None], top_k: int, permuted: bool, eps: float | None, dtype: torch.dtype | None = None
) -> None:
    problem = moe_combine_problem(named, top_k, permuted, eps, dtype)
    if problem is not None:
        raise RuntimeError(f"fusionpass::moe_combine: {problem}")
