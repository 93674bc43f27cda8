"""Arithmetic the kernels share: widening, rounding, the sigmoid. Compiled by Triton or run by its interpreter.

INTERPRETED is passed to the kernels as a constexpr because the interpreter (3.9) differs from the compiler in three things.
It has no libdevice. It truncates fp32 to bf16, where the compiler rounds to nearest even. And it garbles bf16 subnormals in
both directions. The code here works on bit patterns instead.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def widened(x, INTERPRETED: tl.constexpr):
    """x in fp32."""
    return unpacked(x) if INTERPRETED else x.to(tl.float32)


@triton.jit
def unpacked(x):
    """`widened` by the bits: those of a bf16 are the upper half of its fp32's.

    Two instructions for a pair, where the conversion takes three: for the kernels that sum over rows, 2.26 us for 2.32 at
    32 x 4096 of `moe_combine` (H100). Not for `gated_add`, whose few elements the assembler then waits for in the middle
    of the sigmoid: 1.25 us for 1.22 at 1 x 4096.
    """
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def rounded(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """An fp32 x in `dtype`, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where(x == x, nearest, (bits >> 16) | 0x40)  # a quiet NaN stays one
        y = nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(dtype)
    return y


@triton.jit
def sigmoid(x, PRECISE: tl.constexpr, INTERPRETED: tl.constexpr):
    """1 / (1 + exp(-x)) of an fp32 x. PRECISE: with the exponential and division of ATen's CUDA kernels, bit for bit."""
    if not PRECISE:
        s = tl.sigmoid(x)
    elif INTERPRETED:
        s = 1.0 / (1.0 + tl.exp(-x))
    else:
        s = tl.div_rn(1.0, 1.0 + libdevice.exp(-x))
    return s


INTERPRETED = not isinstance(sigmoid, triton.JITFunction)
