"""gate_projected_add_backward, computed in one pass over memory and one small sum

    db = dy * s;  dlogit = rowsum(dy * b) * s * (1 - s);  dx = dlogit . weight;  dweight = dlogit^T . x
    dbias = sum(dlogit);  s = sigmoid(logit)

shapes    dy, b, db: [..., H]   logit: [..., 1]   dx, x: [..., K]   weight, dweight: K elements   dbias: [1]
          x is None where the weight needs no gradient
strides   contiguous; H and K up to 8192. Any other layout, and mixed dtypes, use the same formulas in ATen
dtypes    bf16, fp16, fp32, one for all; arithmetic, sums over a row and over rows in fp32, one rounding at the store
order     dweight sums the rows of each program in order, then the programs' sums in order: the same bits on every run
traffic   (rows * (3 * H + 2 * K + 1) + 2 * K) * itemsize + 8 * programs * K; eager moves rows * (7 * H + 3 * K) * itemsize
          in nine kernels
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import INTERPRETED, rounded, sigmoid, widened
from .gate_projected_add import blocks_and_warps
from .launch_limits import needs_int64
from .launching import Calls, Launch, in_order, layouts

COLUMNS_LIMIT = 8192  # a thread holds five values for each of its 16 columns; with 32 columns, registers spill
# The best of 1 to 4: see fusionpass/bench/measured.md.
PROGRAMS_PER_MULTIPROCESSOR = 2
SUM_ROWS, SUM_COLUMNS = 64, 32
POINTERS = ("DY", "X", "W", "LOGIT", "B", "DX", "DB", "SUMS", "BIAS_SUMS")


@triton.jit(do_not_specialize=["rows", "programs"])  # one variant for any number of rows
def gate_projected_add_backward_kernel(
    DY, X, W, LOGIT, B, DX, DB, SUMS, BIAS_SUMS, rows, programs,
    NEED_BIAS: tl.constexpr, NEED_WEIGHT: tl.constexpr, WIDE: tl.constexpr, PRECISE: tl.constexpr,
    INTERPRETED: tl.constexpr, K: tl.constexpr, H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program computes every `programs`-th row and keeps its share of dweight in registers until the end."""
    program = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    h = tl.arange(0, BLOCK_H)
    dtype: tl.constexpr = DX.dtype.element_ty
    w = widened(tl.load(W + k, mask=k < K, other=0.0), INTERPRETED)
    sums = tl.zeros([BLOCK_K], tl.float32)
    bias_sum = 0.0
    for i in range(program, rows, programs):
        row = i
        if WIDE:
            row = row.to(tl.int64)
        dy = widened(tl.load(DY + row * H + h, mask=h < H, other=0.0), INTERPRETED)
        b = widened(tl.load(B + row * H + h, mask=h < H, other=0.0), INTERPRETED)
        s = sigmoid(widened(tl.load(LOGIT + row), INTERPRETED), PRECISE, INTERPRETED)
        tl.store(DB + row * H + h, rounded(dy * s, dtype, INTERPRETED), mask=h < H)
        dlogit = tl.sum(dy * b) * s * (1.0 - s)
        tl.store(DX + row * K + k, rounded(dlogit * w, dtype, INTERPRETED), mask=k < K)
        if NEED_WEIGHT:
            sums += dlogit * widened(tl.load(X + row * K + k, mask=k < K, other=0.0), INTERPRETED)
        bias_sum += dlogit
    if NEED_WEIGHT:
        tl.store(SUMS + program * K + k, sums, mask=k < K)
    if NEED_BIAS:
        tl.store(BIAS_SUMS + program, bias_sum)


@triton.jit(do_not_specialize=["rows"])
def sum_rows_kernel(SUMS, Y, rows, INTERPRETED: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y[k] = sum of sums[:, k], BLOCK columns a program, ROWS rows at a time."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        total += tl.load(SUMS + row * K + k, mask=(row < rows) & (k < K), other=0.0)
    y = tl.sum(total, 0)[None, :]
    tl.store(Y + k, rounded(y, Y.dtype.element_ty, INTERPRETED), mask=k < K)


def fits(dy: Tensor, x: Tensor | None, weight: Tensor, logit: Tensor, b: Tensor) -> bool:
    """Whether the kernels take these layouts and dtypes. The caller must check shapes and devices."""
    return (
        dy.dtype == weight.dtype == logit.dtype == b.dtype
        and 0 < weight.numel() <= COLUMNS_LIMIT
        and 0 < dy.shape[-1] <= COLUMNS_LIMIT
        and 0 < logit.numel() < 2**31 - 2**16
        and dy.is_contiguous()
        and (x is None or x.is_contiguous())
        and weight.is_contiguous()
        and logit.is_contiguous()
        and b.is_contiguous()
    )


_calls = Calls()


def gradients(
    dy: Tensor, x: Tensor | None, weight: Tensor, logit: Tensor, b: Tensor, rows: Sequence[int], need_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """(dx, dweight, dbias, db), new tensors, for operands that fit. dweight is flat, and None if x is None.

    rows: the leading dims of dx.
    """
    key = (need_bias, *layouts(dy, x, weight, logit, b))
    call, summing, programs = _calls.get(key) or _calls.keep(key, _prepared(dy, x, weight, need_bias))
    k, memory = weight.numel(), {"dtype": torch.float32, "device": dy.device}
    dx = torch.empty((*rows, k), dtype=dy.dtype, device=dy.device)
    db = torch.empty_like(b)
    sums = dx if x is None else torch.empty((programs, k), **memory)
    bias_sums = torch.empty(programs, **memory) if need_bias else dx
    call(dy, dy if x is None else x, weight, logit, b, dx, db, sums, bias_sums)
    dweight = None
    if x is not None:
        dweight = torch.empty(k, dtype=dy.dtype, device=dy.device)
        summing(sums, dweight)
    return dx, dweight, bias_sums.sum().to(dy.dtype).reshape(1) if need_bias else None, db


def _prepared(dy: Tensor, x: Tensor | None, weight: Tensor, need_bias: bool) -> tuple[Launch, Launch, int]:
    k, h, rows = weight.numel(), dy.shape[-1], prod(dy.shape[:-1])
    block_k, block_h, warps = blocks_and_warps(k, h)
    programs = min(rows, PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(dy.device))
    wide = needs_int64(rows * max(k, h) + max(block_k, block_h))
    device, kernel = dy.get_device(), gate_projected_add_backward_kernel
    counts = {"rows": rows, "programs": programs}
    constants = {
        "NEED_BIAS": need_bias,
        "NEED_WEIGHT": x is not None,
        "WIDE": wide,
        "PRECISE": dy.dtype == torch.float32,
        "INTERPRETED": INTERPRETED,
        "K": k,
        "H": h,
        "BLOCK_K": block_k,
        "BLOCK_H": block_h,
    }
    arguments, compiled_for = in_order(kernel, POINTERS, counts | constants), (dy.dtype, *constants.values())
    call = Launch(kernel, device, programs, arguments, compiled_for, num_warps=warps)
    constants = {"INTERPRETED": INTERPRETED, "K": k, "ROWS": SUM_ROWS, "BLOCK": SUM_COLUMNS}
    arguments = in_order(sum_rows_kernel, ("SUMS", "Y"), {"rows": programs} | constants)
    blocks = triton.cdiv(k, SUM_COLUMNS)
    summing = Launch(sum_rows_kernel, device, blocks, arguments, (dy.dtype, *constants.values()))
    return call, summing, programs


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
