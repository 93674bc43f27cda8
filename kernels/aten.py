"""The formulas in ATen: what the ops compute on a CPU, their gradients, and a differentiable form of each.

numerics "fp32"   every intermediate in fp32, one rounding to the result's dtype at the end
numerics "eager"  the unfused expression: sigmoid, product and sum each rounded to the dtype

The result's dtype is the one given, else the operands' promoted. Mixed operands are promoted by ATen itself, so
`fp32 * bf16` below is an fp32 product without a cast copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import linear

from .contract import result_dtype
from .layout import contiguous_strides, sum_strides


def gated_add_expression(
    a: Tensor, gate: Tensor, b: Tensor, numerics: str = "fp32", dtype: torch.dtype | None = None
) -> Tensor:
    """a + sigmoid(gate) * b from differentiable ops, for autograd transforms that need more than one derivative rule."""
    if numerics == "eager":
        return a + torch.sigmoid(gate) * b
    return (a.float() + torch.sigmoid(gate.float()) * b.float()).to(result_dtype(dtype, a, gate, b))


def gate_projected_add_expression(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """a + sigmoid(x . weight + bias) * b from differentiable ops, in fp32."""
    logit = linear(x.float(), weight.reshape(1, -1).float(), None if bias is None else bias.reshape(1).float())
    gate = logit.reshape(*a.shape[:-1], 1)
    return (a.float() + torch.sigmoid(gate) * b.float()).to(result_dtype(dtype, x, a, b))


def constant_logit(bias: Tensor | None, x: Tensor, rows: Sequence[int]) -> Tensor:
    """The gate logit [..., 1] of an `x` without columns: the bias, or zero."""
    logit = x.new_zeros(1) if bias is None else bias.reshape(1)
    return logit.expand(*rows, 1)


def empty_sum(a: Tensor, gate: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Unwritten memory with the shape and strides of `a + torch.sigmoid(gate) * b`, for b shaped as a; dtype: None for
    that of `a`."""
    if a.is_contiguous():
        return torch.empty_like(a, dtype=dtype, memory_format=torch.contiguous_format)
    strides = sum_strides(a.shape, a.stride(), gate.shape, gate.stride(), b.stride())
    return torch.empty_strided(a.shape, strides, dtype=dtype or a.dtype, device=a.device)


def empty_row_gated_sum(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """As `empty_sum`, for a contiguous gate of one element per row."""
    if a.is_contiguous():
        return torch.empty_like(a, dtype=dtype, memory_format=torch.contiguous_format)
    rows = (*a.shape[:-1], 1)
    strides = sum_strides(a.shape, a.stride(), rows, contiguous_strides(rows), b.stride())
    return torch.empty_strided(a.shape, strides, dtype=dtype or a.dtype, device=a.device)


def gated_add(a: Tensor, gate: Tensor, b: Tensor, numerics: str = "fp32", dtype: torch.dtype | None = None) -> Tensor:
    """a + sigmoid(gate) * b, a new tensor."""
    if numerics == "eager":
        return a + torch.sigmoid(gate) * b
    y = empty_sum(a, gate, b, result_dtype(dtype, a, gate, b))
    gated_add_into(y, a, gate, b)
    return y


def gate_projected_add(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """a + sigmoid(x . weight + bias) * b, a new tensor."""
    y = empty_row_gated_sum(a, b, result_dtype(dtype, x, a, b))
    gate_projected_add_into(y, x, weight, bias, a, b)
    return y


def gated_add_into(out: Tensor, a: Tensor, gate: Tensor, b: Tensor, numerics: str = "fp32") -> None:
    """Write a + sigmoid(gate) * b into `out`, of any strides; `out` may be `a`, `b` or a full-size `gate` itself."""
    if numerics == "fp32":
        gate = gate.float()
    torch.add(a, torch.sigmoid(gate) * b, out=out)


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


def gated_add_gradients(
    dy: Tensor,
    gate: Tensor | None,
    b: Tensor | None,
    numerics: str,
    needs: tuple[bool, bool, bool],
    dtypes: tuple[torch.dtype, torch.dtype] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(da, dgate, db) of gated_add; None where `needs` says so. Only dgate reads b, only dgate and db read the gate.

    dtypes: of a and b; None where they are that of dy.

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
    """(dx, dweight, dbias, da, db) of gate_projected_add and its logit; None where `needs` says so.

    dweight is flat, dbias has one element. Only dweight reads x, only dx reads the weight, and only these two and dbias
    read b. dlogit is what reaches the logit itself, from a second derivative. dtypes: as in `gated_add_gradients`.

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
