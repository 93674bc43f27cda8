"""moe_combine in ATen: for CPU tensors, and for gradients, which the kernel has none of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from .contract import combined_dtype


def moe_combine_expression(
    a: Tensor, b: Tensor, gate: Tensor | None, x: Tensor | None, gate_weight: Tensor | None, gate_bias: Tensor | None,
    topk_weights: Tensor | None, inverse: Tensor | None, masked: Tensor | None, residual: Tensor | None,
    norm_weight: Tensor | None,
    top_k: int, permuted: bool, eps: float | None, offset: float, dtype: torch.dtype | None = None,
    *, compute: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sum and the normed sum in differentiable ops, computed in `compute` and rounded once; the truth in float64,
    which is rounded not at all."""
    h, final = b.shape[-1], compute
    if compute == torch.float32:
        final = combined_dtype(dtype, a, b, gate, x, residual)
    shape = b.shape if residual is None else residual.shape
    b = b.reshape(-1, h).to(compute)
    routed = a.reshape(-1, h).to(compute)
    if top_k:
        weights = topk_weights.reshape(-1, 1).to(compute)
        routed = weighted_sum(routed, weights, inverse, masked, top_k, permuted)
    if x is not None:
        x = x.reshape(b.shape[0], x.shape[-1])
        bias = None if gate_bias is None else gate_bias.reshape(1).to(compute)
        gate = linear(x.to(compute), gate_weight.reshape(1, -1).to(compute), bias)
    total = routed + torch.sigmoid(gate.reshape(-1, 1).to(compute)) * b
    if residual is not None:
        total = total + residual.reshape(-1, h).to(compute)
    if eps is None:
        return total.to(final).reshape(shape).contiguous(), total.new_empty(0, dtype=final)
    normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    if norm_weight is not None:
        normed = normed * (norm_weight.to(compute) + offset)
    # Eager may hand on the very memory of a view; the op's results are always their own.
    return tuple(result.to(final).reshape(shape).contiguous() for result in (total, normed))


def weighted_sum(
    y: Tensor, weights: Tensor, inverse: Tensor | None, masked: Tensor | None, top_k: int, permuted: bool
) -> Tensor:
    """Of the rows of `y` and one weight for each, [rows / top_k, columns], in the dtype that promotion gives."""
    if masked is not None:
        y = y.masked_fill(masked.reshape(-1, 1), 0)
    if permuted:
        y = y * weights
    if inverse is not None:
        y = y[inverse.reshape(-1)]
    if not permuted:
        y = y * weights
    return y.reshape(y.shape[0] // top_k, top_k, y.shape[-1]).sum(1)


Projected = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor], Tensor]
Gated = Callable[[Tensor, Tensor, Tensor], Tensor]
Norm = Callable[[Tensor, Tensor | None, float, float], Tensor]


def moe_combine_steps(
    a: Tensor, b: Tensor, gate: Tensor | None, x: Tensor | None, gate_weight: Tensor | None, gate_bias: Tensor | None,
    topk_weights: Tensor | None, inverse: Tensor | None, masked: Tensor | None, residual: Tensor | None,
    norm_weight: Tensor | None,
    top_k: int, permuted: bool, eps: float | None, offset: float, dtype: torch.dtype | None,
    *, projected: Projected, gated: Gated, norm: Norm,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sum and the normed sum step by step, as the nodes compute them that the op replaces; each step in the dtype that
    its operands or autocast give it, the sum in `dtype` where that is not None.

    For where autograd records, since no more is then saved than by these nodes, and for autocast, whose rules go by node.
    projected, gated, norm: how the three steps that differ are computed.
    """
    h, shape = b.shape[-1], b.shape if residual is None else residual.shape
    b, routed = b.reshape(-1, h), a.reshape(-1, h)
    if top_k:
        routed = weighted_sum(routed, topk_weights.reshape(-1, 1), inverse, masked, top_k, permuted)
    if x is None:
        total = gated(routed, gate.reshape(-1, 1), b)
    else:
        total = projected(x.reshape(b.shape[0], x.shape[-1]), gate_weight, gate_bias, routed, b)
    if residual is not None:
        total = total + residual.reshape(-1, h)
    total = (total if dtype is None else total.to(dtype)).reshape(shape).contiguous()
    return total, total.new_empty(0) if eps is None else norm(total, norm_weight, eps, offset)


def projected_nodes(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """a + sigmoid(x . weight + bias) * b, as nodes."""
    return gated_nodes(a, linear(x, weight.reshape(1, -1), None if bias is None else bias.reshape(1)), b)


def gated_nodes(a: Tensor, gate: Tensor, b: Tensor) -> Tensor:
    """a + sigmoid(gate) * b, as nodes."""
    return a + torch.sigmoid(gate) * b


def norm_nodes(total: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    """The RMSNorm as nodes: in float32, its result in the dtype of the sum, or of the weight where that is wider."""
    wide = total.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(total.dtype)
    return (normed * (weight.reshape(-1).float() + offset)).to(torch.promote_types(total.dtype, weight.dtype))


def rms_norm_gradients(
    dy: Tensor, total: Tensor, weight: Tensor | None, eps: float, offset: float, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """(dtotal, dweight) of the RMSNorm of `total`, computed in fp32; None where `needs` says so.

    dtotal = r * (g - n * mean(g * n));  dweight = sum over rows(dy * n);  r = rsqrt(mean(total ** 2) + eps);
    n = total * r;  g = dy * (offset + weight)
    """
    wide, dy = total.float(), dy.float()
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    n = wide * r
    dweight = None
    if weight is not None and needs[1]:
        dweight = (dy * n).reshape(-1, n.shape[-1]).sum(0).reshape(weight.shape).to(weight.dtype)
    if not needs[0]:
        return None, dweight
    g = dy if weight is None else dy * (weight.float().reshape(-1) + offset)
    return (r * (g - n * (g * n).mean(-1, keepdim=True))).to(total.dtype), dweight
