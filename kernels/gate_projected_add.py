"""gate_projected_add: y = a + sigmoid(x . weight + bias) * b

shapes    a, b, y: [..., H]   x: [..., K], as many rows as a   weight: [1, K], [K, 1] or [K]   bias: one element or None
strides   any for each tensor, 0 included for x, weight, a and b; y is given
dtypes    bf16, fp16, fp32, one for all; arithmetic in fp32, one rounding at the store
traffic   (rows * (3 * H + K) + K) * itemsize; eager moves (rows * (5 * H + K + 4) + K) * itemsize in four kernels,
          Inductor rows * 2 * itemsize more than this one, in two
gradient  da = dy;  db = dy * s;  dlogit = rowsum(dy * b) * s * (1 - s);  dx = dlogit . weight;  dweight = dlogit^T . x;
          dbias = sum(dlogit);  s = sigmoid(x . weight + bias)
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import INTERPRETED, rounded, sigmoid, widened
from .launching import Launch
from .layout import last_offset, row_offset, row_runs
from .pointers import GRID_LIMIT, at, needs_int64, on_device_of

BLOCK = 1024  # 4 warps x 32 lanes x 8 elements: one 16-byte access per lane and tensor in bf16


def gate_projected_add_reference(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Truth for tests: the formula in float64, unrounded."""
    logit = x.double() @ weight.double().reshape(-1) + (0.0 if bias is None else bias.double())
    return a.double() + logit.sigmoid().reshape(*a.shape[:-1], 1) * b.double()


@triton.jit
def gate_projected_add_kernel(
    X, W, BIAS, A, B, Y, x_row, x_col, w_col, a_row, a_col, b_row, b_col, y_row, y_col,
    HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, PRECISE: tl.constexpr, INTERPRETED: tl.constexpr,
    K: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program computes one row: its logit, then its H results.

    K and H are compiled in: a model has one of each, and where BLOCK divides them no mask is left. (With them as
    arguments, moreover, Triton 3.6 cannot interpret the loops beside NumPy 2.4.)
    """
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    if WIDE:
        row = row.to(tl.int64)
        lane = lane.to(tl.int64)
    terms = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        k = start + lane  # [BLOCK]
        x = widened(tl.load(X + row * x_row + k * x_col, mask=k < K, other=0.0), INTERPRETED)
        w = widened(tl.load(W + k * w_col, mask=k < K, other=0.0), INTERPRETED)
        terms += x * w
    logit = tl.sum(terms)
    if HAS_BIAS:
        logit += widened(tl.load(BIAS), INTERPRETED)
    s = sigmoid(logit, PRECISE, INTERPRETED)
    for start in range(0, H, BLOCK):
        h = start + lane  # [BLOCK]
        a = widened(tl.load(A + row * a_row + h * a_col, mask=h < H, other=0.0), INTERPRETED)
        b = widened(tl.load(B + row * b_row + h * b_col, mask=h < H, other=0.0), INTERPRETED)
        tl.store(Y + row * y_row + h * y_col, rounded(a + s * b, Y.dtype.element_ty, INTERPRETED), mask=h < H)


@lru_cache(maxsize=1024)
def _plan(x_shape, x, w_col, shape, a, b, y, has_bias, precise):
    """From sizes and strides: (the launch, the rows and the offset of (x, a, b, y) of each launch)."""
    k, h = x_shape[-1], shape[-1]
    leads = (x_shape[:-1], x[:-1]), (shape[:-1], a[:-1]), (shape[:-1], b[:-1]), (shape[:-1], y[:-1])
    run, rows = row_runs(*leads)
    last = [
        last_offset((run, n), pair) for n, *pair in zip((k, h, h, h), rows, (x[-1], a[-1], b[-1], y[-1]), strict=True)
    ]
    wide = needs_int64(max(k + BLOCK, h + BLOCK, (k - 1) * w_col, *last))
    numbers = [rows[0], x[-1], w_col]
    for row, operand in zip(rows[1:], (a, b, y), strict=True):
        numbers += [row, operand[-1]]
    launches = []
    for start in range(0, prod(shape[:-1]), run):
        for first in range(0, run, GRID_LIMIT):
            count = min(run - first, GRID_LIMIT)
            launches.append((count, [row_offset(start + first, *lead) for lead in leads]))
    constants = (has_bias, wide, precise, INTERPRETED, k, h, BLOCK)
    return Launch(gate_projected_add_kernel, (*numbers, *constants)), launches


def launch(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> None:
    """Write a + sigmoid(x . weight + bias) * b into `y`. Shapes, dtypes and devices are the caller's to check."""
    if y.numel() == 0:
        return
    w_col = weight.stride(0) if weight.dim() == 1 or weight.shape[1] == 1 else weight.stride(1)
    # In fp32 the approximate exponential and division of tl.sigmoid would show; in 16 bits they do not.
    variant = bias is not None, y.dtype == torch.float32
    run, launches = _plan(x.shape, x.stride(), w_col, a.shape, a.stride(), b.stride(), y.stride(), *variant)
    bias = weight if bias is None else bias
    with on_device_of(y):
        for rows, (of_x, of_a, of_b, of_y) in launches:
            run(rows, y.get_device(), at(x, of_x), weight, bias, at(a, of_a), at(b, of_b), at(y, of_y))
