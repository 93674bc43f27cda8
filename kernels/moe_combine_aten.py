"""moe_combine in ATen: the op's arguments, its contract, its result where the kernel does not compute it, and the nodes.
The nodes are for gradients: the kernel has no backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from .contract import (
    MOST_COLUMNS,
    MOST_TOP_K,
    kind_problem,
    known_outside,
    known_to_differ,
    listed,
    one_dtype_problem,
    result_dtype,
    shapes_differ,
)


class Arguments(NamedTuple):
    """The arguments of moe_combine, as in its schema. The tensors come first.

    A tuple costs a call less than a dict. Where speed does not matter, its fields are read by name.
    """

    a: Tensor  # the routed sum, [rows, H]; with top_k the terms of the sum, [rows * top_k, H]
    b: Tensor | None = None  # the shared expert; with neither gate nor x it is added as it is
    gate: Tensor | None = None  # one logit per row; or the projection x . gate_weight + gate_bias
    x: Tensor | None = None
    gate_weight: Tensor | None = None
    gate_bias: Tensor | None = None
    topk_weights: Tensor | None = None
    inverse: Tensor | None = None  # the places in `a` of each row's terms
    masked: Tensor | None = None  # True for a term that counts as zero, in the order of `a`
    residual: Tensor | None = None
    norm_weight: Tensor | None = None
    post_norm_weight: Tensor | None = None
    top_k: int = 0
    permuted: bool = False  # whether the weights are in the order of `a`, not of the rows
    eps: float | None = None  # None: there is no norm
    offset: float = 0.0
    dtype: torch.dtype | None = None
    routed_scale: float = 1.0  # a factor of the routed sum
    scale: float = 1.0  # a factor of the routed sum and the shared expert together
    post_eps: float | None = None  # of the norm before the residual is added; None: there is no such norm
    post_offset: float = 0.0

    def shape(self) -> Sequence[int]:
        """The shape of the results."""
        for given in (self.residual, self.b):
            if given is not None:
                return given.shape
        if not self.top_k:
            return self.a.shape
        if self.a.dim() > 2 and self.a.shape[-2] == self.top_k:  # [..., top_k, H]
            return (*self.a.shape[:-2], self.a.shape[-1])
        return (prod(self.a.shape[:-1]) // self.top_k, self.a.shape[-1])

    @property
    def gated(self) -> bool:
        return self.gate is not None or self.x is not None

    def result_dtype(self) -> torch.dtype:
        """The dtype of both results. The routing weights and the norm's weight do not take part in promotion. They are often
        kept in float32 beside rows of 16 bits, and the results have the dtype of the rows."""
        return result_dtype(self.dtype, self.a, self.b, self.gate, self.x, self.residual)


TENSORS = Arguments._fields.index("top_k")  # how many of the arguments are tensors
INDICES = {"inverse": (torch.int32, torch.int64), "masked": (torch.bool,)}  # the tensors that are not floating-point


def moe_combine_problem(given: Arguments) -> str | None:
    named = {name: t for name, t in zip(Arguments._fields, given[:TENSORS], strict=False) if t is not None}
    for name in ("b", "a", "x", "residual"):
        if name in named and named[name].dim() == 0:
            return f"{name} has no dims, allowed: one or more"
    # What the others must fit: the first of these that is given, which for the routed sum alone are its terms.
    like = next(name for name in ("b", "residual", "a") if name in named)
    told, h, top_k = named[like], given.a.shape[-1] if like == "a" else named[like].shape[-1], given.top_k
    floating = {like: told} | {name: t for name, t in named.items() if name not in INDICES}
    projection = {name: named[name] for name in ("x", "gate_weight", "gate_bias") if name in named}
    problem = kind_problem(floating, given.dtype) or (one_dtype_problem(projection) if projection else None)
    if problem is not None:
        return problem
    for name, allowed in INDICES.items():
        if name in named and named[name].dtype not in allowed:
            return f"{name} is {named[name].dtype}, allowed: {' or '.join(map(str, allowed))}"
    for name, tensor in named.items():
        if tensor.device != told.device:
            return f"{name} is on {tensor.device}, allowed: {told.device} as {like}"
    if known_outside(h, 1, MOST_COLUMNS):
        return f"{like} has {h} columns, allowed: 1 to {MOST_COLUMNS}"
    if not 0 <= top_k <= MOST_TOP_K or (top_k > 0) != ("topk_weights" in named):
        return f"top_k is {top_k}, allowed: 1 to {MOST_TOP_K} with topk_weights, 0 without"
    if ("inverse" in named or "masked" in named or given.permuted) and not top_k:
        return "inverse, masked or permuted is given and top_k is 0, allowed: with topk_weights"
    if given.permuted and "inverse" not in named:
        return "permuted is True, allowed: with inverse"
    if ("gate" in named and "x" in named) or ("x" in named) != ("gate_weight" in named):
        return "allowed: either gate, or x and gate_weight, or none of them"
    if given.gated and "b" not in named:
        return "a gate is given without b, which it gates"
    if "gate_bias" in named and "x" not in named:
        return "gate_bias is given without x"
    rows = prod(told.shape[:-1])
    if like == "a" and top_k:
        if known_to_differ(rows % top_k, 0):
            return f"a is {listed(told.shape)}, allowed: a number of rows that top_k, {top_k}, divides"
        rows = rows // top_k
    slots = rows * top_k
    sizes = {
        "a": slots * h if top_k else rows * h,
        "topk_weights": slots,
        "inverse": slots,
        "masked": slots,
        "gate": rows,
        "residual": rows * h,
        "norm_weight": h,
        "post_norm_weight": h,
        "gate_bias": 1,
    }
    for name, size in sizes.items():
        if name in named and known_to_differ(named[name].numel(), size):
            return f"{name} is {listed(named[name].shape)}, allowed: {size} elements for {like} {listed(told.shape)}"
    for name in ("a", "residual"):
        if name in named and known_to_differ(named[name].shape[-1], h):
            return f"{name} is {listed(named[name].shape)}, allowed: {h} columns as {like}"
    if "x" in named:
        x, weight = named["x"], named["gate_weight"]
        if known_to_differ(prod(x.shape[:-1]), rows):
            return f"x is {listed(x.shape)}, allowed: as many rows as b, which is {listed(told.shape)}"
        k = x.shape[-1]
        if all(shapes_differ(weight.shape, allowed) for allowed in ((1, k), (k, 1), (k,))):
            return f"gate_weight is {listed(weight.shape)}, allowed: [1, {k}], [{k}, 1] or [{k}]"
    if given.eps is None and "norm_weight" in named:
        return "norm_weight is given without eps"
    if given.post_eps is None and "post_norm_weight" in named:
        return "post_norm_weight is given without post_eps"
    return None


def check_moe_combine(given: Arguments) -> None:
    problem = moe_combine_problem(given)
    if problem is not None:
        raise RuntimeError(f"fusionpass::moe_combine: {problem}")


def moe_combine_expression(given: Arguments, *, compute: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The sum and the normed sum in differentiable ops, computed in `compute` and rounded once. With float64 they are the
    truth for tests and are not rounded."""
    h, final = given.a.shape[-1], compute
    if compute == torch.float32:
        final = given.result_dtype()
    shape = given.shape()
    routed = given.a.reshape(-1, h).to(compute)
    if given.top_k:
        weights = given.topk_weights.reshape(-1, 1).to(compute)
        routed = weighted_sum(routed, weights, given)
    total = scaled(routed, given.routed_scale)
    if given.b is not None:
        shared = given.b.reshape(-1, h).to(compute)
        if given.gated:
            shared = torch.sigmoid(logit_of(given, compute)) * shared
        total = total + shared
    total = scaled(total, given.scale)
    if given.post_eps is not None:
        total = rms_norm(total, given.post_norm_weight, given.post_eps, given.post_offset)
    if given.residual is not None:
        total = total + given.residual.reshape(-1, h).to(compute)
    if given.eps is None:
        return total.to(final).reshape(shape).contiguous(), total.new_empty(0, dtype=final)
    normed = rms_norm(total, given.norm_weight, given.eps, given.offset)
    # Eager may return a view of an operand's memory. The op's results always have memory of their own.
    return tuple(result.to(final).reshape(shape).contiguous() for result in (total, normed))


def rms_norm(total: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    """In the dtype of the rows."""
    normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return normed if weight is None else normed * (weight.to(total.dtype) + offset)


def scaled(rows: Tensor, factor: float) -> Tensor:
    return rows if factor == 1.0 else rows * factor


def logit_of(given: Arguments, compute: torch.dtype) -> Tensor:
    """The gate logit of each row, [rows, 1]."""
    if given.x is None:
        return given.gate.reshape(-1, 1).to(compute)
    x = given.x.reshape(prod(given.x.shape[:-1]), given.x.shape[-1])
    bias = None if given.gate_bias is None else given.gate_bias.reshape(1).to(compute)
    return linear(x.to(compute), given.gate_weight.reshape(1, -1).to(compute), bias).reshape(-1, 1)


def weighted_sum(y: Tensor, weights: Tensor, given: Arguments) -> Tensor:
    """The sum of the rows of `y`, each with its weight, [rows / top_k, columns], in the dtype that promotion gives."""
    if given.masked is not None:
        y = y.masked_fill(given.masked.reshape(-1, 1), 0)
    if given.permuted:
        y = y * weights
    if given.inverse is not None:
        y = y[given.inverse.reshape(-1)]
    if not given.permuted:
        y = y * weights
    return y.reshape(y.shape[0] // given.top_k, given.top_k, y.shape[-1]).sum(1)


Projected = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor], Tensor]
Gated = Callable[[Tensor, Tensor, Tensor], Tensor]
Norm = Callable[[Tensor, Tensor | None, float, float], Tensor]


def moe_combine_steps(given: Arguments, *, projected: Projected, gated: Gated, norm: Norm) -> tuple[Tensor, Tensor]:
    """The sum and the normed sum step by step, as the replaced nodes compute them. Each step has the dtype that its operands
    or autocast give it. The sum has the given `dtype`, if there is one.

    It is used where autograd records, because it saves no more than these nodes, and for autocast, whose rules are per node.
    projected, gated, norm: how the three steps that differ are computed.
    """
    h, shape = given.a.shape[-1], given.shape()
    routed = given.a.reshape(-1, h)
    b = None if given.b is None else given.b.reshape(-1, h)
    if given.top_k:
        routed = weighted_sum(routed, given.topk_weights.reshape(-1, 1), given)
    routed = scaled(routed, given.routed_scale)
    if b is None:
        total = routed
    elif given.x is not None:
        x = given.x.reshape(b.shape[0], given.x.shape[-1])
        total = projected(x, given.gate_weight, given.gate_bias, routed, b)
    elif given.gate is not None:
        total = gated(routed, given.gate.reshape(-1, 1), b)
    else:
        total = routed + b
    total = scaled(total, given.scale)
    if given.post_eps is not None:
        total = norm(total, given.post_norm_weight, given.post_eps, given.post_offset)
    if given.residual is not None:
        total = total + given.residual.reshape(-1, h)
    total = (total if given.dtype is None else total.to(given.dtype)).reshape(shape).contiguous()
    return total, total.new_empty(0) if given.eps is None else norm(total, given.norm_weight, given.eps, given.offset)


def norm_nodes(total: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    """The RMSNorm as nodes: in float32. Its result has the dtype of the sum, or of the weight if that is wider."""
    wide = total.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(total.dtype)
    return (normed * (weight.reshape(-1).float() + offset)).to(torch.promote_types(total.dtype, weight.dtype))


def rms_norm_gradients(
    dy: Tensor, total: Tensor, weight: Tensor | None, eps: float, offset: float, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """(dtotal, dweight) of the RMSNorm of `total`, computed in fp32; None for those that `needs` leaves out.

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
