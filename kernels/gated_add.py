"""gated_add: y = a + sigmoid(gate) * b

shapes    a, b, y: [...], one shape        gate: any shape that broadcasts to it
strides   any for each tensor, 0 included for a, gate and b; y is given, and may be a, b or a gate of its shape
dtypes    bf16, fp16, fp32, one for all. numerics "fp32": arithmetic in fp32, one rounding at the store;
          "eager": sigmoid, product and sum each rounded to the dtype, bit for bit what eager CUDA gives
traffic   (3 * numel(a) + numel(gate)) * itemsize; eager's three kernels move (5 * numel(a) + 3 * numel(gate)) * itemsize,
          Inductor's one kernel moves what this one does
gradient  da = dy;  db = dy * s;  dgate = sum over broadcast dims(dy * b) * s * (1 - s),  s = sigmoid(gate)
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import INTERPRETED, rounded, sigmoid, widened
from .launching import Launch
from .layout import broadcast_strides, collapse, last_offset
from .pointers import at, needs_int64, on_device_of

BLOCK = 1024  # 4 warps x 32 lanes x 8 elements: one 16-byte access per lane and tensor in bf16
LOOPS = 4  # dims the kernel itself walks; the host walks those beyond


def gated_add_reference(a: Tensor, gate: Tensor, b: Tensor) -> Tensor:
    """Truth for tests: the formula in float64, unrounded."""
    return a.double() + gate.double().sigmoid() * b.double()


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
    """Element i of the flat index has coordinates (i0, i1, i2, i3), i3 fastest; the last DIMS of them exist."""
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

    dtype: tl.constexpr = Y.dtype.element_ty
    g = tl.load(G + offset(i0, i1, i2, i3, g0, g1, g2, g3, DIMS), mask=inside, other=0.0)
    b = tl.load(B + offset(i0, i1, i2, i3, b0, b1, b2, b3, DIMS), mask=inside, other=0.0)
    a = tl.load(A + offset(i0, i1, i2, i3, a0, a1, a2, a3, DIMS), mask=inside, other=0.0)
    s = sigmoid(widened(g, INTERPRETED), PRECISE, INTERPRETED)
    p = s * widened(b, INTERPRETED)
    if EAGER:
        s = widened(rounded(s, dtype, INTERPRETED), INTERPRETED)
        p = widened(rounded(s * widened(b, INTERPRETED), dtype, INTERPRETED), INTERPRETED)
    y = rounded(widened(a, INTERPRETED) + p, dtype, INTERPRETED)
    tl.store(Y + offset(i0, i1, i2, i3, y0, y1, y2, y3, DIMS), y, mask=inside)


@lru_cache(maxsize=1024)
def _plan(shape, a, gate_shape, gate, b, y, eager, precise):
    """From sizes and strides: (blocks per launch, the launch, the offset of (a, gate, b, y) at each launch)."""
    strides = a, broadcast_strides(shape, gate_shape, gate), b, y
    sizes, strides = collapse(shape, *strides, order=y)
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
    numbers = ([1] * (LOOPS - dims) + sizes)[1:]
    for operand in strides:
        numbers += [0] * (LOOPS - dims) + operand
    # With a fused multiply-add the product is not rounded, and the result is no longer eager's.
    launch = Launch(
        gated_add_kernel,
        (numel, *numbers, dims, wide, eager, precise, INTERPRETED, BLOCK),
        enable_fp_fusion=not eager,
    )
    return triton.cdiv(numel, BLOCK), launch, offsets  # 2**31 - 1 blocks, the grid's limit, are 2**41 elements


def launch(y: Tensor, a: Tensor, gate: Tensor, b: Tensor, numerics: str = "fp32") -> None:
    """Write a + sigmoid(gate) * b into `y`. Shapes, dtypes and devices are the caller's to check."""
    if y.numel() == 0:
        return
    eager = numerics == "eager"
    # In fp32 the approximate exponential and division of tl.sigmoid would show; in 16 bits they do not.
    precise = eager or y.dtype == torch.float32
    strides = a.stride(), gate.shape, gate.stride(), b.stride(), y.stride()
    blocks, run, offsets = _plan(a.shape, *strides, eager, precise)
    with on_device_of(y):
        for of_a, of_gate, of_b, of_y in offsets:
            run(blocks, y.get_device(), at(a, of_a), at(gate, of_gate), at(b, of_b), at(y, of_y))
