"""gate_projected_add: y = a + sigmoid(x . weight + bias) * b

shapes    a, b, y: [..., H]   x: [..., K], as many rows as a   weight: [1, K], [K, 1] or [K]   bias: one element or None
strides   any for each tensor, 0 included for x, weight, a and b; y is given
dtypes    bf16, fp16, fp32: one for x, weight, bias and the logit, one for each of a, b and y; arithmetic in fp32, one
          rounding at the store
traffic   (rows * (3 * H + K) + K) * itemsize; eager moves (rows * (5 * H + K + 4) + K) * itemsize in four kernels,
          Inductor moves rows * 2 * itemsize more than this kernel, in two kernels
gradient  da = dy;  db = dy * s;  dlogit = rowsum(dy * b) * s * (1 - s);  dx = dlogit . weight;  dweight = dlogit^T . x;
          dbias = sum(dlogit);  s = sigmoid(x . weight + bias)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd, prod

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import gate_projected_add_aten as aten
from . import gated_add
from .arithmetic import INTERPRETED, rounded, sigmoid, unpacked
from .contract import result_dtype
from .launch_limits import GRID_LIMIT, needs_int64
from .launching import Calls, Launch, Launches, Result, in_order, layouts, prepared, warps_for
from .layout import last_offset, row_offset, row_runs
from .programmatic_launch import dependent_launch

BLOCK_LIMIT = 8192  # columns of one program; a larger H takes more programs, a larger K more rounds
# A program that has its whole row in flight at once is faster than one that loops over it. The measurements behind these
# constants are in fusionpass/bench/measured.md.
COLUMNS_PER_WARP = 256  # 32 lanes x 8 elements, one 16-byte access in bf16
MOST_WARPS = 16

# Few rows leave most of the chip idle. Then several programs share a row, and each computes the whole dot product.
SPLITS = ((8, 0, 4), (48, 2048, 2))  # (most rows, only above so many columns, programs per row)
# A sum over fewer warps is done sooner. Longer rows, and many rows, need more warps.
FEW_WARPS, FEW_WARPS_UP_TO, FEW_WARPS_ROWS = 8, 4096, 128
POINTERS = ("X", "W", "BIAS", "A", "B", "Y", "LOGIT")


def gate_projected_add_reference(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Truth for tests: the formula in float64, unrounded."""
    logit = x.double() @ weight.double().reshape(-1) + (0.0 if bias is None else bias.double())
    return a.double() + logit.sigmoid().reshape(*a.shape[:-1], 1) * b.double()


@triton.jit
def dot_operands(X, W, x_col, w_col, k, K: tl.constexpr):
    """Columns k of one row's x, and of w."""
    return tl.load(X + k * x_col, mask=k < K, other=0.0), tl.load(W + k * w_col, mask=k < K, other=0.0)


@triton.jit
def dot(x, w, X, W, x_col, w_col, lane, K: tl.constexpr, BLOCK: tl.constexpr):
    """x . w of one row, in fp32. lane: arange(0, BLOCK), in the width of the offsets; x, w: `dot_operands` at `lane`.

    These first ones are a kernel's first loads, for all else waits for their sum, and what one multiprocessor reads of the
    L2 cache comes in turn, 64 bytes a clock. 32 x 4096 of `moe_combine` takes 2.58 us where the other operands are asked
    for before them, 2.26 after (H100).
    """
    terms = unpacked(x) * unpacked(w)
    for start in range(BLOCK, K, BLOCK):
        x, w = dot_operands(X, W, x_col, w_col, start + lane, K)
        terms += unpacked(x) * unpacked(w)
    return tl.sum(terms)


@triton.jit
def gate_projected_add_kernel(
    X, W, BIAS, A, B, Y, LOGIT, x_row, x_col, w_col, a_row, a_col, b_row, b_col, y_row, y_col,
    HAS_BIAS: tl.constexpr, KEEP_LOGIT: tl.constexpr, WIDE: tl.constexpr, PRECISE: tl.constexpr,
    INTERPRETED: tl.constexpr, DEPENDENT: tl.constexpr, VECTOR: tl.constexpr,
    K: tl.constexpr, H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program computes one row's logit and BLOCK_H of its results.

    K and H are compiled in: a model has one of each, and where a block is as long no mask is left. (With them as
    arguments, moreover, Triton 3.6 cannot interpret the loop beside NumPy 2.4.)
    """
    programs: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    row = tl.program_id(0) // programs
    h = tl.program_id(0) % programs * BLOCK_H + tl.arange(0, BLOCK_H)
    lane = tl.arange(0, BLOCK_K)
    if WIDE:
        row = row.to(tl.int64)
        h = h.to(tl.int64)
        lane = lane.to(tl.int64)
    if DEPENDENT:
        gdc_wait()  # nothing before this reads or writes memory, the weight included
        gdc_launch_dependents()
    X += tl.multiple_of(row * x_row, VECTOR)
    x, w = dot_operands(X, W, x_col, w_col, lane, K)
    a = tl.load(A + tl.multiple_of(row * a_row, VECTOR) + h * a_col, mask=h < H, other=0.0)
    b = tl.load(B + tl.multiple_of(row * b_row, VECTOR) + h * b_col, mask=h < H, other=0.0)
    logit = dot(x, w, X, W, x_col, w_col, lane, K, BLOCK_K)
    if HAS_BIAS:
        logit += unpacked(tl.load(BIAS))
    if KEEP_LOGIT:
        first = tl.program_id(0) % programs == 0
        tl.store(LOGIT + row, rounded(logit, LOGIT.dtype.element_ty, INTERPRETED), mask=first)
    y = unpacked(a) + sigmoid(logit, PRECISE, INTERPRETED) * unpacked(b)
    tl.store(
        Y + tl.multiple_of(row * y_row, VECTOR) + h * y_col, rounded(y, Y.dtype.element_ty, INTERPRETED), mask=h < H
    )


def blocks_and_warps(k: int, h: int) -> tuple[int, int, int]:
    """Columns of a block of x and of one of b, and the warps that share them."""
    block_k, block_h = (min(triton.next_power_of_2(n), BLOCK_LIMIT) for n in (k, h))
    return block_k, block_h, warps_for(max(k, h), COLUMNS_PER_WARP, MOST_WARPS)


def vector(row_strides: Sequence[int], itemsize: int) -> int:
    """Elements of the widest access, of at most 16 bytes, to which the starts of all rows are aligned.

    By itself Triton sees only whether a stride is a multiple of 16 elements. With 3000 columns it is not.
    """
    return gcd(16 // itemsize, *row_strides)


def column_stride(weight: Tensor) -> int:
    """Of a weight [1, K], [K, 1] or [K]."""
    return weight.stride(0) if weight.dim() == 1 or weight.shape[1] == 1 else weight.stride(1)


def _prepared(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *, keep_logit: bool = False
) -> Launch | Launches:
    k, h = x.shape[-1], a.shape[-1]
    run, rows = row_runs(*((tensor.shape[:-1], tensor.stride()[:-1]) for tensor in (x, a, b, y)))
    columns = [tensor.stride(-1) for tensor in (x, a, b, y)]
    last = [last_offset((run, n), pair) for n, *pair in zip((k, h, h, h), rows, columns, strict=True)]
    block_k, block_h, warps = blocks_and_warps(k, h)
    count = prod(a.shape[:-1])
    split = next((n for most, beyond, n in SPLITS if count <= most and h > beyond), 1)
    block_h = max(block_h // split, 1)
    if count <= FEW_WARPS_ROWS and max(k, h) <= FEW_WARPS_UP_TO:
        warps = min(warps, FEW_WARPS)
    w_col = column_stride(weight)
    # Lanes past the end are masked, but their offsets must not wrap around either.
    idle = [block_k * columns[0], block_k * w_col, *(block_h * column for column in columns[1:])]
    wide = needs_int64(max((k - 1) * w_col, *last) + max(idle))
    # In fp32 the approximate exponential and division of tl.sigmoid would be visible; in 16 bits they are not.
    precise = y.dtype == torch.float32
    device = y.get_device()
    dependent = dependent_launch(device)
    itemsize = min(tensor.element_size() for tensor in (x, a, b, y))
    numbers = {f"{name}_row": row for name, row in zip("xaby", rows, strict=True)}
    numbers |= {f"{name}_col": column for name, column in zip("xaby", columns, strict=True)}
    numbers |= {
        "w_col": w_col,
        "HAS_BIAS": bias is not None,
        "KEEP_LOGIT": keep_logit,
        "WIDE": wide,
        "PRECISE": precise,
        "INTERPRETED": INTERPRETED,
        "DEPENDENT": dependent,
        "VECTOR": vector(rows, itemsize),
        "K": k,
        "H": h,
        "BLOCK_K": block_k,
        "BLOCK_H": block_h,
    }
    arguments = in_order(gate_projected_add_kernel, POINTERS, numbers)
    dtypes = x.dtype, a.dtype, b.dtype, y.dtype
    options = {"num_warps": warps, "launch_pdl": True} if dependent else {"num_warps": warps}
    programs = triton.cdiv(h, block_h)
    launches = []
    for start in range(0, count, run):
        for first in range(0, run, GRID_LIMIT // programs):
            blocks = min(run - first, GRID_LIMIT // programs) * programs
            of_x, of_a, of_b, of_y = (
                row_offset(start + first, tensor.shape[:-1], tensor.stride()[:-1]) for tensor in (x, a, b, y)
            )
            launch = Launch(gate_projected_add_kernel, device, blocks, arguments, (dtypes, *arguments), **options)
            launches.append((launch, [of_x, 0, 0, of_a, of_b, of_y, start + first if keep_logit else 0]))
    return prepared(launches)


def _without_columns(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, y: Tensor, _: Tensor) -> None:
    """Takes the kernel's place if x has no columns, since the kernel does not compile then: the logit is the bias, or
    zero."""
    gated_add.launch(y, a, aten.constant_logit(None if bias is weight else bias, x, a.shape[:-1]), b)


def _call(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, **how: bool
) -> Callable | None:
    """The call that writes into memory with the layout of `y`; None if `y` has no elements."""
    if y.numel() == 0:
        return None
    return _without_columns if x.shape[-1] == 0 else _prepared(y, x, weight, bias, a, b, **how)


_into = Calls()
_fresh = Calls()
_with_logit = Calls()


def launch(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> None:
    """Write a + sigmoid(x . weight + bias) * b into `y`. The caller must check shapes, dtypes and devices."""
    if y.numel() == 0:
        return
    key = layouts(x, weight, bias, a, b, y)
    call = _into.get(key) or _into.keep(key, _call(y, x, weight, bias, a, b))
    call(x, weight, weight if bias is None else bias, a, b, y, y)


def gate_projected_add(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """a + sigmoid(x . weight + bias) * b, a new tensor with the strides of the eager expression, and its dtype if none is
    given.

    Raises:
        RuntimeError: outside the op's contract. It is checked on the first call with these layouts only.
    """
    # The same key as from `layouts`, written out as one flat tuple: this costs the CPU less.
    key = (
        x.shape, x.stride(), weight.shape, weight.stride(), a.shape, a.stride(), b.shape, b.stride(),
        x.dtype, weight.dtype, a.dtype, b.dtype, x.get_device(), weight.get_device(), a.get_device(), b.get_device(),
        bias is not None and layouts(bias), dtype,
    )  # fmt: skip
    known = _fresh.get(key)
    if known is None:
        aten.check_gate_projected_add(x, weight, bias, a, b, dtype)
        y = aten.empty_row_gated_sum(a, b, result_dtype(dtype, x, a, b))
        known = _fresh.keep(key, (Result(a, y.stride(), y.dtype), _call(y, x, weight, bias, a, b)))
    result, call = known
    y = result.empty(a)
    if call is not None:
        call(x, weight, weight if bias is None else bias, a, b, y, y)
    return y


def gate_projected_add_and_logit(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The same, and the gate logit [..., 1], rounded to the dtype of x. The gradients need the logit.

    Raises:
        RuntimeError: outside the op's contract.
    """
    key = dtype, *layouts(x, weight, bias, a, b)
    known = _with_logit.get(key)
    if known is None:
        aten.check_gate_projected_add(x, weight, bias, a, b, dtype)
        y = aten.empty_row_gated_sum(a, b, result_dtype(dtype, x, a, b))
        call = _call(y, x, weight, bias, a, b, keep_logit=True)
        known = _with_logit.keep(key, (Result(a, y.stride(), y.dtype), call))
    result, call = known
    y = result.empty(a)
    if call is None or call is _without_columns:
        if call is not None:
            call(x, weight, weight if bias is None else bias, a, b, y, y)
        return y, aten.projected_logit(x, weight, bias, a)
    logit = torch.empty((*a.shape[:-1], 1), dtype=x.dtype, device=a.device)
    call(x, weight, weight if bias is None else bias, a, b, y, logit)
    return y, logit
