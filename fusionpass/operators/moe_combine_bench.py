"""moe_combine in the benchmark: the region with a gate, and without one; its weighted sum gathered, or in order."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from fusionpass.operators.declaration import Bench

EPS = 1e-6
TOP_8 = 8
TOP_10 = 10  # as in Qwen3-Next
Shapes = dict[str, tuple[int, ...]]


def _normed(total: Tensor, norm_weight: Tensor) -> tuple[Tensor, Tensor]:
    wide = total.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return total, norm_weight * normed.to(total.dtype)


def _gated_expression(x, gate_weight, a, b, residual, norm_weight):
    return _normed(residual + (a + torch.sigmoid(linear(x, gate_weight)) * b), norm_weight)


def _gated_here(x, gate_weight, a, b, residual, norm_weight):
    options = {"x": x, "gate_weight": gate_weight, "residual": residual, "norm_weight": norm_weight, "eps": EPS}
    return torch.ops.fusionpass.moe_combine(a, b, **options)


def _gated_shapes(t: int, h: int) -> Shapes:
    return {"x": (t, h), "weight": (1, h), "a": (t, h), "b": (t, h), "residual": (t, h), "norm_weight": (h,)}


def _terms(t: int, h: int, top_k: int, gathered: bool) -> Shapes:
    inverse = {"inverse": (t * top_k,)} if gathered else {}
    return {"y": (t * top_k, h), "topk_weights": (t * top_k, 1), **inverse}


def _gated_top_k(top_k: int) -> Bench:
    def expression(x, gate_weight, y, topk_weights, inverse, b, residual, norm_weight):
        a = (y * topk_weights)[inverse].view(-1, top_k, y.shape[-1]).sum(1)
        return _gated_expression(x, gate_weight, a, b, residual, norm_weight)

    def here(x, gate_weight, y, topk_weights, inverse, b, residual, norm_weight):
        options = {"x": x, "gate_weight": gate_weight, "residual": residual, "norm_weight": norm_weight, "eps": EPS}
        routed = {"topk_weights": topk_weights, "inverse": inverse, "top_k": top_k, "permuted": True}
        return torch.ops.fusionpass.moe_combine(y, b, **routed, **options)

    def shapes(t: int, h: int) -> Shapes:
        rows = {"b": (t, h), "residual": (t, h), "norm_weight": (h,)}
        return {"x": (t, h), "weight": (1, h), **_terms(t, h, top_k, True), **rows}

    return Bench(
        expression,
        here,
        shapes,
        reads=lambda t, h: (3 + top_k) * t * h + 2 * h + 5 * top_k * t,  # the inverse counts 4 elements of 16 bit
        writes=lambda t, h: 2 * t * h,
    )


# Without a gate: the weighted sum of 8 experts, [the shared expert,] the residual and its norm.


def _summed(terms: Tensor, columns: int) -> Tensor:
    return terms.view(-1, TOP_8, columns).sum(1)


def _gathered_expression(y, topk_weights, inverse, residual, norm_weight):
    return _normed(residual + _summed((y * topk_weights)[inverse], y.shape[-1]), norm_weight)


def _batched_expression(y, topk_weights, residual, norm_weight):
    return _normed(residual + _summed(y * topk_weights, y.shape[-1]), norm_weight)


def _shared_expression(y, topk_weights, inverse, b, residual, norm_weight):
    return _normed(residual + (_summed((y * topk_weights)[inverse], y.shape[-1]) + b), norm_weight)


def _ungated_here(y, topk_weights, b, **options):
    return torch.ops.fusionpass.moe_combine(y, b, topk_weights=topk_weights, top_k=TOP_8, eps=EPS, **options)


def _gathered_here(y, topk_weights, inverse, residual, norm_weight):
    options = {"inverse": inverse, "permuted": True, "residual": residual, "norm_weight": norm_weight}
    return _ungated_here(y, topk_weights, None, **options)


def _batched_here(y, topk_weights, residual, norm_weight):
    return _ungated_here(y, topk_weights, None, residual=residual, norm_weight=norm_weight)


def _shared_here(y, topk_weights, inverse, b, residual, norm_weight):
    options = {"inverse": inverse, "permuted": True, "residual": residual, "norm_weight": norm_weight}
    return _ungated_here(y, topk_weights, b, **options)


def _ungated(expression, here, *, gathered: bool, shared: bool = False, found: bool = True) -> Bench:
    def shapes(t: int, h: int) -> Shapes:
        b = {"b": (t, h)} if shared else {}
        return {**_terms(t, h, TOP_8, gathered), **b, "residual": (t, h), "norm_weight": (h,)}

    return Bench(
        expression,
        here,
        shapes,
        reads=lambda t, h: (TOP_8 + 1 + shared) * t * h + h + (5 if gathered else 1) * TOP_8 * t,
        writes=lambda t, h: 2 * t * h,
        found=found,
    )


CASES: dict[str, Bench] = {
    "moe_combine": Bench(  # gate projection, formula, residual, RMSNorm
        _gated_expression,
        _gated_here,
        _gated_shapes,
        reads=lambda t, h: 4 * t * h + 2 * h,  # x, a, b, residual, weight, norm weight
        writes=lambda t, h: 2 * t * h,  # the sum, the normed sum
    ),
    "moe_combine_top_10": _gated_top_k(TOP_10),  # the same with the weighted sum that makes a
    "finalize_top_8": _ungated(_gathered_expression, _gathered_here, gathered=True),  # Qwen3-MoE, experts of grouped_mm
    # Of batched_mm. In a model the pass knows the sum by the top-k in front of it, which is not part of the case.
    "finalize_top_8_batched": _ungated(_batched_expression, _batched_here, gathered=False, found=False),
    # DeepSeek-V3, GLM-4
    "finalize_top_8_shared": _ungated(_shared_expression, _shared_here, gathered=True, shared=True),
}
