"""gated_add: y = a + sigmoid(gate) * b

shapes    a, b, y: [...], one shape        gate: any shape that broadcasts to it
strides   any for each tensor, 0 included for a, gate and b; y is given, and may be a, b or a gate of its shape
dtypes    bf16, fp16, fp32, one for each. numerics "fp32": arithmetic in fp32, one rounding at the store; "eager":
          sigmoid, product and sum each rounded to the one dtype of all, bit for bit what eager CUDA gives
traffic   (3 * numel(a) + numel(gate)) * itemsize; eager's three kernels move (5 * numel(a) + 3 * numel(gate)) * itemsize,
          Inductor's one kernel moves as much as this one
gradient  da = dy;  db = dy * s;  dgate = sum over broadcast dims(dy * b) * s * (1 - s),  s = sigmoid(gate)
"""

from __future__ import annotations

from itertools import product
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import gated_add_aten as aten
from .arithmetic import INTERPRETED, rounded, sigmoid, widened
from .contract import result_dtype
from .launch_limits import needs_int64
from .launching import Calls, Launch, Launches, Result, in_order, layouts, prepared
from .layout import broadcast_strides, collapse, last_offset
from .programmatic_launch import dependent_launch

# (most elements, elements of a block, warps). With few elements there are too few blocks to fill the chip. These two won
# among 512, 1024 and 2048 elements with 1 to 8 warps: see fusionpass/bench/measured.md.
ROW_BLOCKS = ((2**19, 1024, 8), (None, 2048, 8))
# If blocks of their own would be this much longer than the rows, the rows are read as one flat piece. This is so at 3000,
# not at 5120 and 7168. There one logit for each block is faster than one for each element.
MOST_IDLE = 1.25
BLOCK = 1024  # for any other layout. 4 warps x 32 lanes x 8 elements: one 16-byte access per lane and tensor in bf16
LOOPS = 4  # dims that the kernel for any layout loops over; the host loops over further ones
POINTERS = ("A", "G", "B", "Y")  # of both kernels


def gated_add_reference(a: Tensor, gate: Tensor, b: Tensor) -> Tensor:
    """Truth for tests: the formula in float64, unrounded."""
    return a.double() + gate.double().sigmoid() * b.double()


@triton.jit
def combined(a, g, b, dtype: tl.constexpr, EAGER: tl.constexpr, PRECISE: tl.constexpr, INTERPRETED: tl.constexpr):
    """a + sigmoid(g) * b in `dtype`."""
    s = sigmoid(widened(g, INTERPRETED), PRECISE, INTERPRETED)
    if EAGER:
        s = widened(rounded(s, dtype, INTERPRETED), INTERPRETED)
    p = s * widened(b, INTERPRETED)
    if EAGER:
        p = widened(rounded(p, dtype, INTERPRETED), INTERPRETED)
    return rounded(widened(a, INTERPRETED) + p, dtype, INTERPRETED)


@triton.jit
def gated_add_rows_kernel(
    A, G, B, Y, numel, a_row, g_row, b_row, y_row,
    H: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, EAGER: tl.constexpr, PRECISE: tl.constexpr,
    INTERPRETED: tl.constexpr, DEPENDENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of H neighbours and one logit for each row, the layout of a model's hidden states.

    A block is a piece of one row, which reads its logit once; FLAT, for contiguous rows that blocks do not divide, a
    piece of the whole, so that only the last one has idle lanes.
    """
    block = tl.program_id(0)
    if WIDE:
        block = block.to(tl.int64)
    if FLAT:
        i = block * BLOCK + tl.arange(0, BLOCK)
        inside = i < numel
        row = i // H
        at_a, at_b, at_y = i, i, i
        at_g = row * g_row
    else:
        per_row: tl.constexpr = (H + BLOCK - 1) // BLOCK
        row = block // per_row
        h = block % per_row * BLOCK + tl.arange(0, BLOCK)
        inside = h < H
        at_a, at_b, at_y = row * a_row + h, row * b_row + h, row * y_row + h
        at_g = row * g_row
    if DEPENDENT:
        gdc_wait()  # nothing before this reads or writes memory
        gdc_launch_dependents()
    g = tl.load(G + at_g, mask=inside, other=0.0) if FLAT else tl.load(G + at_g)
    b = tl.load(B + at_b, mask=inside, other=0.0)
    a = tl.load(A + at_a, mask=inside, other=0.0)
    tl.store(Y + at_y, combined(a, g, b, Y.dtype.element_ty, EAGER, PRECISE, INTERPRETED), mask=inside)


@triton.jit
def offset(i0, i1, i2, i3, s0, s1, s2, s3, DIMS: tl.constexpr):
    """Offset of the element at these coordinates, of which the last DIMS exist."""
    at = i3 * s3
    if DIMS > 1:
        at += i2 * s2
    if DIMS > 2:
        at += i1 * s1
    if DIMS > 3:
        at += i0 * s0
    return at


@triton.jit(do_not_specialize=["n1", "n2"])  # they divide row numbers only: a variant for each alignment gains nothing
def gated_add_kernel(
    A, G, B, Y, numel, n1, n2, n3,
    a0, a1, a2, a3, g0, g1, g2, g3, b0, b1, b2, b3, y0, y1, y2, y3,
    DIMS: tl.constexpr, WIDE: tl.constexpr, EAGER: tl.constexpr, PRECISE: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Any layout. Element i of the flat index has coordinates (i0, i1, i2, i3), i3 fastest; the last DIMS of them exist."""
    block = tl.program_id(0)
    if WIDE:
        block = block.to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = i < numel
    i0, i1, i2, i3 = i, i, i, i
    if DIMS > 1:
        i3 = i % n3
        i2 = i // n3
    if DIMS > 2:
        i1 = i2 // n2
        i2 = i2 % n2
    if DIMS > 3:
        i0 = i1 // n1
        i1 = i1 % n1

    g = tl.load(G + offset(i0, i1, i2, i3, g0, g1, g2, g3, DIMS), mask=inside, other=0.0)
    b = tl.load(B + offset(i0, i1, i2, i3, b0, b1, b2, b3, DIMS), mask=inside, other=0.0)
    a = tl.load(A + offset(i0, i1, i2, i3, a0, a1, a2, a3, DIMS), mask=inside, other=0.0)
    y = combined(a, g, b, Y.dtype.element_ty, EAGER, PRECISE, INTERPRETED)
    tl.store(Y + offset(i0, i1, i2, i3, y0, y1, y2, y3, DIMS), y, mask=inside)


def _rows_launch(device, dtypes, sizes, strides, shape, eager) -> Launch | None:
    """The launch over rows of neighbours with one logit each; None for any other layout.

    The rows must be those of the tensor, because H is compiled in. A size that changes from call to call must not be.
    """
    if not sizes or len(sizes) > 2 or sizes[-1] != shape[-1] or [operand[-1] for operand in strides] != [1, 0, 1, 1]:
        return None
    h = sizes[-1]
    rows = sizes[0] if len(sizes) == 2 else 1
    a, g, b, y = (operand[0] if rows > 1 else 0 for operand in strides)
    numel = rows * h
    dependent = dependent_launch(device)
    block, warps = next((block, warps) for most, block, warps in ROW_BLOCKS if most is None or numel <= most)
    per_row = triton.cdiv(h, block)
    flat = per_row * block > MOST_IDLE * h and (rows == 1 or a == b == y == h)
    if not flat and h < block:
        return None
    blocks = triton.cdiv(numel, block) if flat else rows * per_row
    furthest = (last_offset(sizes, operand) + block for operand in strides)
    wide = needs_int64(max(*furthest, blocks * block))
    numbers = {
        "numel": numel,
        "a_row": a,
        "g_row": g,
        "b_row": b,
        "y_row": y,
        "H": h,
        "FLAT": flat,
        "WIDE": wide,
        "EAGER": eager,
        "PRECISE": _precise(dtypes[-1], eager),
        "INTERPRETED": INTERPRETED,
        "DEPENDENT": dependent,
        "BLOCK": block,
    }
    arguments = in_order(gated_add_rows_kernel, POINTERS, numbers)
    options = {"num_warps": warps, "launch_pdl": True} if dependent else {"num_warps": warps}
    # With a fused multiply-add the product is not rounded, and the result is no longer eager's.
    options["enable_fp_fusion"] = not eager
    # Triton compiles no more of `numel` in than this.
    compiled_for = (dtypes, needs_int64(numel), numel % 16 == 0, numel == 1, arguments[1:])
    return Launch(gated_add_rows_kernel, device, blocks, arguments, compiled_for, **options)


def _precise(dtype: torch.dtype, eager: bool) -> bool:
    """In fp32 the approximate exponential and division of tl.sigmoid would be visible; in 16 bits they are not."""
    return eager or dtype == torch.float32


def _prepared(y: Tensor, a: Tensor, gate: Tensor, b: Tensor, numerics: str) -> Launch | Launches:
    eager = numerics == "eager"
    shape = tuple(a.shape)
    strides = a.stride(), broadcast_strides(shape, gate.shape, gate.stride()), b.stride(), y.stride()
    sizes, strides = collapse(shape, *strides, order=y.stride())
    device = y.get_device()
    dtypes = a.dtype, gate.dtype, b.dtype, y.dtype
    rows = _rows_launch(device, dtypes, sizes, strides, shape, eager)
    if rows is not None:
        return rows
    if not sizes:
        sizes, strides = [1], [[0]] * 4
    outer = max(len(sizes) - LOOPS, 0)
    indices = product(*map(range, sizes[:outer]))
    offsets = [
        [sum(i * s for i, s in zip(index, operand[:outer], strict=True)) for operand in strides] for index in indices
    ]
    sizes, strides = sizes[outer:], [operand[outer:] for operand in strides]
    numel = prod(sizes)
    wide = needs_int64(max(numel + BLOCK, *(last_offset(sizes, operand) for operand in strides)))
    dims = len(sizes)
    missing = LOOPS - dims
    numbers = {"numel": numel} | {f"n{dim}": n for dim, n in enumerate([1] * missing + sizes) if dim}
    for name, operand in zip("agby", strides, strict=True):
        numbers |= {f"{name}{dim}": stride for dim, stride in enumerate([0] * missing + operand)}
    numbers |= {
        "DIMS": dims,
        "WIDE": wide,
        "EAGER": eager,
        "PRECISE": _precise(y.dtype, eager),
        "INTERPRETED": INTERPRETED,
        "BLOCK": BLOCK,
    }
    arguments = in_order(gated_add_kernel, POINTERS, numbers)
    blocks = triton.cdiv(numel, BLOCK)  # the grid's limit, 2**31 - 1 blocks, is 2**41 elements
    launch = Launch(gated_add_kernel, device, blocks, arguments, (dtypes, *arguments), enable_fp_fusion=not eager)
    return prepared([(launch, each) for each in offsets])


_into = Calls()
_fresh = Calls()


def launch(y: Tensor, a: Tensor, gate: Tensor, b: Tensor, numerics: str = "fp32") -> None:
    """Write a + sigmoid(gate) * b into `y`. The caller must check shapes, dtypes and devices."""
    if y.numel() == 0:
        return
    key = (numerics, *layouts(a, gate, b, y))
    call = _into.get(key) or _into.keep(key, _prepared(y, a, gate, b, numerics))
    call(a, gate, b, y)


def gated_add(a: Tensor, gate: Tensor, b: Tensor, numerics: str = "fp32", dtype: torch.dtype | None = None) -> Tensor:
    """a + sigmoid(gate) * b, a new tensor with the strides of the eager expression, and its dtype if none is given.

    Raises:
        RuntimeError: outside the op's contract. It is checked on the first call with these layouts only.
    """
    # The same key as from `layouts`, written out as one flat tuple: this costs the CPU less.
    key = (
        numerics, dtype, a.shape, a.stride(), gate.shape, gate.stride(), b.shape, b.stride(), a.dtype, gate.dtype, b.dtype,
        a.get_device(), gate.get_device(), b.get_device(),
    )  # fmt: skip
    known = _fresh.get(key)
    if known is None:
        aten.check_gated_add(a, gate, b, numerics, dtype)
        y = aten.empty_sum(a, gate, b, result_dtype(dtype, a, gate, b))
        call = _prepared(y, a, gate, b, numerics) if y.numel() else None
        known = _fresh.keep(key, (Result(a, y.stride(), y.dtype), call))
    result, call = known
    y = result.empty(a)
    if call is not None:
        call(a, gate, b, y)
    return y
