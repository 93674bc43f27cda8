"""moe_combine: the combine region of a sparse layer, each stage of it optional but the formula

    sum    = residual + routed + sigmoid(logit) * b        routed = a, or sum_k weights[t, k] * y[inverse[t, k]]
    normed = sum / sqrt(mean(sum ** 2) + eps) * (offset + norm_weight)        logit = gate, or x . gate_weight + bias

shapes    T rows of H <= 16384 columns in b, residual, sum, normed and a; y is [T * K, H] or [T, K, H] with K <= 32
strides   any; an operand whose rows no single stride crosses is copied first; the results are contiguous
dtypes    bf16, fp16, fp32, one for all but weights and norm_weight, which may be fp32; inverse int32 or int64;
          arithmetic in fp32, sums over k too, and one rounding per result
traffic   T * H * (K or 1, + 1 for b, + 1 for x, + 1 for residual, + 1 for sum, + 1 for normed) * itemsize, and little more
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import contract
from .arithmetic import INTERPRETED, rounded, sigmoid, widened
from .gate_projected_add import BLOCK_LIMIT, COLUMNS_PER_WARP, MOST_WARPS, column_stride, dot
from .launching import Calls, Launch, layouts
from .layout import last_offset
from .pointers import needs_int64


@triton.jit
def moe_combine_kernel(
    A, WEIGHTS, INVERSE, B, GATE, X, W, BIAS, RESIDUAL, NORM, SUM, NORMED,
    a_row, a_col, weight_step, inverse_step, b_row, b_col, gate_row, x_row, x_col, w_col, r_row, r_col, norm_step,
    TOP_K: tl.constexpr, INDEXED: tl.constexpr, PERMUTED: tl.constexpr, PROJECTED: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_NORM: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr,
    EPS: tl.constexpr, OFFSET: tl.constexpr, WIDE: tl.constexpr, PRECISE: tl.constexpr, INTERPRETED: tl.constexpr,
    K: tl.constexpr, H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program computes one row: the norm needs all of it, and everything is on its way before anything is waited for."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    lane = tl.arange(0, BLOCK_K)
    if WIDE:
        h = h.to(tl.int64)
        lane = lane.to(tl.int64)
    mask = h < H
    b = tl.load(B + row * b_row + h * b_col, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(RESIDUAL + row * r_row + h * r_col, mask=mask, other=0.0)
    if TOP_K == 0:
        y = widened(tl.load(A + row * a_row + h * a_col, mask=mask, other=0.0), INTERPRETED)
    else:
        y = tl.zeros([BLOCK_H], tl.float32)
        for k in tl.static_range(TOP_K):
            slot = row * TOP_K + k
            source = slot
            if INDEXED:
                source = tl.load(INVERSE + slot * inverse_step).to(tl.int64)
            if PERMUTED:
                weight = tl.load(WEIGHTS + source * weight_step)
            else:
                weight = tl.load(WEIGHTS + slot * weight_step)
            part = tl.load(A + source * a_row + h * a_col, mask=mask, other=0.0)
            y += widened(weight, INTERPRETED) * widened(part, INTERPRETED)
    if PROJECTED:
        logit = dot(X + row * x_row, W, x_col, w_col, lane, K, BLOCK_K, INTERPRETED)
        if HAS_BIAS:
            logit += widened(tl.load(BIAS), INTERPRETED)
    else:
        logit = widened(tl.load(GATE + row * gate_row), INTERPRETED)
    y += sigmoid(logit, PRECISE, INTERPRETED) * widened(b, INTERPRETED)
    if HAS_RESIDUAL:
        y += widened(residual, INTERPRETED)
    tl.store(SUM + row * H + h, rounded(y, SUM.dtype.element_ty, INTERPRETED), mask=mask)
    if HAS_NORM:  # of the sum before its rounding, as Inductor has it; masked lanes are 0
        normed = y * tl.rsqrt(tl.sum(y * y) / H + EPS)
        if HAS_NORM_WEIGHT:
            norm = widened(tl.load(NORM + h * norm_step, mask=mask, other=0.0), INTERPRETED)
            normed *= norm + OFFSET
        tl.store(NORMED + row * H + h, rounded(normed, NORMED.dtype.element_ty, INTERPRETED), mask=mask)


class _Prepared:
    """What is known of a call once its operands' layouts are: the results' shapes and the launch."""

    __slots__ = ("_flat", "_launch", "_norm", "_shape")

    def __init__(self, operands: dict[str, Tensor | None], top_k: int, permuted: bool, eps: float | None, offset: float):
        shaped = operands["b"] if operands["residual"] is None else operands["residual"]
        self._shape = shaped.shape
        self._norm = eps is not None
        rows, h = self._rows(operands, top_k)
        # Most operands are rows as they stand; these are not.
        self._flat = [name for name, t in operands.items() if t is not None and rows[name] is not t]
        count = shaped.numel() // h if h else 0
        self._launch = None if count == 0 else _launch(rows, count, h, top_k, permuted, eps, offset)

    @staticmethod
    def _rows(operands: dict[str, Tensor | None], top_k: int) -> tuple[dict[str, Tensor | None], int]:
        return {name: _as_rows(name, t) for name, t in operands.items()}, operands["b"].shape[-1]

    def __call__(self, operands: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
        b = operands["b"]
        total = torch.empty(self._shape, dtype=b.dtype, device=b.device)
        normed = torch.empty_like(total) if self._norm else total.new_empty(0)
        if self._launch is not None:
            for name in self._flat:
                operands[name] = _as_rows(name, operands[name])
            given = [b if t is None else t for t in operands.values()]
            self._launch(*given, total, normed)
        return total, normed


def _as_rows(name: str, tensor: Tensor | None) -> Tensor | None:
    """The operand with one stride from row to row: [rows, columns], or [rows] of what is one number per row."""
    if tensor is None or name in ("gate_weight", "gate_bias", "norm_weight"):
        return tensor
    wanted = 1 if name in ("topk_weights", "inverse", "gate") else 2
    if tensor.dim() == wanted:
        return tensor
    return tensor.reshape(-1) if wanted == 1 else tensor.reshape(-1, tensor.shape[-1])


def _launch(rows, count: int, h: int, top_k: int, permuted: bool, eps: float | None, offset: float) -> Launch:
    """The kernel over `count` rows. Operands that are absent cost nothing: their loads are compiled away."""
    def steps(name: str) -> tuple[int, int]:
        return (0, 0) if rows[name] is None else tuple(rows[name].stride())

    def step(name: str) -> int:
        return 0 if rows[name] is None else rows[name].stride(0)

    b, x, weight = rows["b"], rows["x"], rows["gate_weight"]
    k = h if x is None else x.shape[-1]
    w_col = 0 if weight is None else column_stride(weight)
    block_h = triton.next_power_of_2(h)
    block_k = min(triton.next_power_of_2(k), max(block_h, BLOCK_LIMIT))
    warps = min(max(1 << (max(k, h) // COLUMNS_PER_WARP).bit_length() >> 1, 1), MOST_WARPS)
    numbers = [*steps("a"), step("topk_weights"), step("inverse"), *steps("b"), step("gate"), *steps("x"), w_col]
    numbers += [*steps("residual"), step("norm_weight")]
    reach = [last_offset((h,), (steps(name)[1],)) for name in ("a", "b", "residual")]
    wide = needs_int64(2 * max(*reach, k * steps("x")[1], k * w_col, h * step("norm_weight")))
    numbers += [top_k, rows["inverse"] is not None, permuted, x is not None, rows["gate_bias"] is not None]
    numbers += [rows["residual"] is not None, eps is not None, rows["norm_weight"] is not None, eps or 0.0, offset]
    numbers += [wide, b.dtype == torch.float32, INTERPRETED, k, h, block_k, block_h]
    dtypes = [None if t is None else t.dtype for t in rows.values()]
    return Launch(moe_combine_kernel, b.get_device(), count, numbers, (*dtypes, *numbers), num_warps=warps)


_known = Calls()


def moe_combine(
    a: Tensor, b: Tensor, gate: Tensor | None, x: Tensor | None, gate_weight: Tensor | None, gate_bias: Tensor | None,
    topk_weights: Tensor | None, inverse: Tensor | None, residual: Tensor | None, norm_weight: Tensor | None,
    top_k: int, permuted: bool, eps: float | None, offset: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sum and the normed sum, new and contiguous; without `eps` the latter is an empty tensor.

    Raises:
        RuntimeError: outside the op's contract; told on the first call with these layouts, which are then known.
    """
    given = (a, topk_weights, inverse, b, gate, x, gate_weight, gate_bias, residual, norm_weight)
    key = (layouts(*given), top_k, permuted, eps, offset)
    operands = dict(zip(NAMES, given, strict=True))
    call = _known.get(key)
    if call is None:
        contract.check_moe_combine(operands, top_k, permuted, eps)
        call = _known.keep(key, _Prepared(operands, top_k, permuted, eps, offset))
    return call(operands)


NAMES = "a topk_weights inverse b gate x gate_weight gate_bias residual norm_weight".split()
