"""gate_projected_add in ATen: the op's contract, its result where the kernel does not compute it, its gradients, and the
nodes. Computed in fp32 and rounded once, as `gated_add` with numerics "fp32"."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import linear

from .contract import kind_problem, known_to_differ, listed, one_dtype_problem, result_dtype, shapes_differ
from .gated_add_aten import gated_nodes
from .layout import contiguous_strides, sum_strides


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


def check_gate_projected_add(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype | None = None
) -> None:
    problem = gate_projected_add_problem(x, weight, bias, a, b, dtype)
    if problem is not None:
        raise RuntimeError(f"fusionpass::gate_projected_add: {problem}")


def gate_projected_add_expression(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """a + sigmoid(x . weight + bias) * b from differentiable ops, in fp32."""
    logit = linear(x.float(), weight.reshape(1, -1).float(), None if bias is None else bias.reshape(1).float())
    gate = logit.reshape(*a.shape[:-1], 1)
    return (a.float() + torch.sigmoid(gate) * b.float()).to(result_dtype(dtype, x, a, b))


def projected_nodes(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """a + sigmoid(x . weight + bias) * b, as nodes."""
    return gated_nodes(a, linear(x, weight.reshape(1, -1), None if bias is None else bias.reshape(1)), b)


def constant_logit(bias: Tensor | None, x: Tensor, rows: Sequence[int]) -> Tensor:
    """The gate logit [..., 1] of an `x` without columns: the bias, or zero."""
    logit = x.new_zeros(1) if bias is None else bias.reshape(1)
    return logit.expand(*rows, 1)


def empty_row_gated_sum(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """As `empty_sum`, for a contiguous gate of one element per row."""
    if a.is_contiguous():
        return torch.empty_like(a, dtype=dtype, memory_format=torch.contiguous_format)
    rows = (*a.shape[:-1], 1)
    strides = sum_strides(a.shape, a.stride(), rows, contiguous_strides(rows), b.stride())
    return torch.empty_strided(a.shape, strides, dtype=dtype or a.dtype, device=a.device)


def gate_projected_add(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """a + sigmoid(x . weight + bias) * b, a new tensor."""
    y = empty_row_gated_sum(a, b, result_dtype(dtype, x, a, b))
    gate_projected_add_into(y, x, weight, bias, a, b)
    return y


def gate_projected_add_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> None:
    """Write a + sigmoid(x . weight + bias) * b into `out`, of any strides."""
    torch.add(a, torch.sigmoid(_projected(x, weight, bias, a)) * b, out=out)


def gate_projected_add_and_logit(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """a + sigmoid(x . weight + bias) * b and the logit [..., 1] in the dtype of x, two new tensors."""
    y, logit = empty_row_gated_sum(a, b, result_dtype(dtype, x, a, b)), _projected(x, weight, bias, a)
    torch.add(a, torch.sigmoid(logit) * b, out=y)
    return y, logit.to(x.dtype, copy=True)


def projected_logit(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor) -> Tensor:
    """x . weight + bias, rounded once to the dtype of x, [..., 1] for the rows of `a`."""
    return _projected(x, weight, bias, a).to(x.dtype, copy=True)


def _projected(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor) -> Tensor:
    """The same in fp32."""
    rows = x.reshape(prod(x.shape[:-1]), x.shape[-1])
    logit = torch.mv(rows.float(), weight.reshape(-1).float())
    if bias is not None:
        logit = logit + bias.reshape(1)
    return logit.reshape(*a.shape[:-1], 1)


def gate_projected_add_gradients(
    dy: Tensor | None,
    dlogit: Tensor | None,
    x: Tensor | None,
    weight: Tensor | None,
    logit: Tensor,
    b: Tensor | None,
    needs: tuple[bool, bool, bool, bool, bool],
    dtypes: tuple[torch.dtype, torch.dtype] | None = None,
) -> tuple[Tensor | None, ...]:
    """(dx, dweight, dbias, da, db) of gate_projected_add and its logit; None for those that `needs` leaves out.

    dweight is flat, dbias has one element. Only dweight reads x, only dx reads the weight, and only these two and dbias
    read b. dlogit is the gradient of the logit itself, from a second derivative. dtypes: as in `gated_add_gradients`.

    da = dy;  db = dy * s;  dl = rowsum(dy * b) * s * (1 - s) + dlogit;  dx = dl . weight;  dweight = dl^T . x
    """
    need_x, need_weight, need_bias, need_a, need_b = needs
    s = torch.sigmoid(logit.float())
    da = db = None
    if dy is not None:
        dtype_a, dtype_b = dtypes or (dy.dtype, dy.dtype)
        da = dy.to(dtype_a) if need_a else None
        db = (dy * s).to(dtype_b) if need_b else None
    dx = dweight = dbias = None
    if need_x or need_weight or need_bias:
        dl = None if dlogit is None else dlogit.float()
        if dy is not None:
            ds = (dy.float() * b).sum(-1, keepdim=True)
            through = torch.ops.aten.sigmoid_backward(ds, s)
            dl = through if dl is None else dl + through
        if need_x:
            dx = (dl * weight.reshape(-1)).to(weight.dtype)
        if need_weight:
            rows = x.reshape(prod(x.shape[:-1]), x.shape[-1])
            dweight = (dl.reshape(1, -1) @ rows.float()).to(x.dtype).reshape(-1)
        if need_bias:
            dbias = dl.sum().to(logit.dtype).reshape(1)
    return dx, dweight, dbias, da, db
