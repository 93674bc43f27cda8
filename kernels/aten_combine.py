"""moe_combine in ATen: for CPU tensors, and for gradients, which the kernel has none of."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


def moe_combine_expression(
    a: Tensor, b: Tensor, gate: Tensor | None, x: Tensor | None, gate_weight: Tensor | None, gate_bias: Tensor | None,
    topk_weights: Tensor | None, inverse: Tensor | None, masked: Tensor | None, residual: Tensor | None,
    norm_weight: Tensor | None,
    top_k: int, permuted: bool, eps: float | None, offset: float, *, dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sum and the normed sum in differentiable ops, computed in `dtype` and rounded once; the truth in float64."""
    h, final = b.shape[-1], b.dtype if dtype == torch.float32 else dtype
    shape = b.shape if residual is None else residual.shape
    b = b.reshape(-1, h).to(dtype)
    routed = a.reshape(-1, h).to(dtype)
    if top_k:
        weights = topk_weights.reshape(-1, 1).to(dtype)
        if masked is not None:
            routed = routed.masked_fill(masked.reshape(-1, 1), 0)
        if permuted:
            routed = routed * weights
        if inverse is not None:
            routed = routed[inverse.reshape(-1)]
        if not permuted:
            routed = routed * weights
        routed = routed.reshape(b.shape[0], top_k, h).sum(1)
    if x is not None:
        bias = None if gate_bias is None else gate_bias.reshape(1).to(dtype)
        gate = linear(x.reshape(-1, x.shape[-1]).to(dtype), gate_weight.reshape(1, -1).to(dtype), bias)
    total = routed + torch.sigmoid(gate.reshape(-1, 1).to(dtype)) * b
    if residual is not None:
        total = total + residual.reshape(-1, h).to(dtype)
    if eps is None:
        return total.to(final).reshape(shape).contiguous(), total.new_empty(0, dtype=final)
    normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    if norm_weight is not None:
        normed = normed * (norm_weight.to(dtype) + offset)
    # Eager may hand on the very memory of a view; the op's results are always their own.
    return tuple(result.to(final).reshape(shape).contiguous() for result in (total, normed))
