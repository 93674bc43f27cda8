"""gated_add in ATen: the op's contract, its result where the kernel does not compute it, its gradients, and the nodes.

numerics "fp32"   every intermediate in fp32, one rounding to the result's dtype at the end
numerics "eager"  the unfused expression: sigmoid, product and sum each rounded to the dtype

The result has the given dtype, else the one to which the operands promote. ATen itself promotes mixed operands, so
`fp32 * bf16` below is an fp32 product without a cast copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import NUMERICS, kind_problem, known_to_differ, listed, one_dtype_problem, result_dtype, shapes_differ
from .layout import sum_strides


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


def check_gated_add(a: Tensor, gate: Tensor, b: Tensor, numerics: str, dtype: torch.dtype | None = None) -> None:
    problem = gated_add_problem(a, gate, b, numerics, dtype)
    if problem is not None:
        raise RuntimeError(f"fusionpass::gated_add: {problem}")


def gated_add_expression(
    a: Tensor, gate: Tensor, b: Tensor, numerics: str = "fp32", dtype: torch.dtype | None = None
) -> Tensor:
    """a + sigmoid(gate) * b from differentiable ops, for autograd transforms that need more than one derivative rule."""
    if numerics == "eager":
        return a + torch.sigmoid(gate) * b
    return (a.float() + torch.sigmoid(gate.float()) * b.float()).to(result_dtype(dtype, a, gate, b))


def gated_nodes(a: Tensor, gate: Tensor, b: Tensor) -> Tensor:
    """a + sigmoid(gate) * b, as nodes."""
    return a + torch.sigmoid(gate) * b


def empty_sum(a: Tensor, gate: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Unwritten memory with the shape and strides of `a + torch.sigmoid(gate) * b`, for b with the shape of a.

    dtype: None means that of `a`."""
    if a.is_contiguous():
        return torch.empty_like(a, dtype=dtype, memory_format=torch.contiguous_format)
    strides = sum_strides(a.shape, a.stride(), gate.shape, gate.stride(), b.stride())
    return torch.empty_strided(a.shape, strides, dtype=dtype or a.dtype, device=a.device)


def gated_add(a: Tensor, gate: Tensor, b: Tensor, numerics: str = "fp32", dtype: torch.dtype | None = None) -> Tensor:
    """a + sigmoid(gate) * b, a new tensor."""
    if numerics == "eager":
        return a + torch.sigmoid(gate) * b
    y = empty_sum(a, gate, b, result_dtype(dtype, a, gate, b))
    gated_add_into(y, a, gate, b)
    return y


def gated_add_into(out: Tensor, a: Tensor, gate: Tensor, b: Tensor, numerics: str = "fp32") -> None:
    """Write a + sigmoid(gate) * b into `out`, of any strides; `out` may be `a`, `b` or a full-size `gate` itself."""
    if numerics == "fp32":
        gate = gate.float()
    torch.add(a, torch.sigmoid(gate) * b, out=out)


def gated_add_gradients(
    dy: Tensor,
    gate: Tensor | None,
    b: Tensor | None,
    numerics: str,
    needs: tuple[bool, bool, bool],
    dtypes: tuple[torch.dtype, torch.dtype] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(da, dgate, db) of gated_add; None for those that `needs` leaves out. Only dgate reads b, only dgate and db the gate.

    dtypes: those of a and b; None if they are that of dy.

    da = dy;  dgate = sum over broadcast dims(dy * b) * s * (1 - s);  db = dy * s;  s = sigmoid(gate)
    """
    need_a, need_gate, need_b = needs
    dtype_a, dtype_b = dtypes or (dy.dtype, dy.dtype)
    da = dy.to(dtype_a) if need_a else None
    if not (need_gate or need_b):
        return da, None, None
    eager = numerics == "eager"
    s = torch.sigmoid(gate if eager else gate.float())
    dgate = None
    if need_gate:
        ds = ((dy if eager else dy.float()) * b).sum_to_size(gate.shape)
        dgate = torch.ops.aten.sigmoid_backward(ds, s).to(gate.dtype)
    db = (dy * s).to(dtype_b) if need_b else None
    return da, dgate, db
