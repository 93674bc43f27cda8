"""The kernel of moe_combine. What it computes, and of what, is said in `moe_combine.py`."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .arithmetic import rounded, sigmoid, unpacked
from .gate_projected_add import dot, dot_operands


@triton.jit
def moe_combine_kernel(
    A, WEIGHTS, INVERSE, MASKED, B, GATE, X, W, BIAS, RESIDUAL, NORM, POST, SUM, NORMED,
    a_row, a_col, weight_step, inverse_step, masked_step, b_row, b_col, gate_row, x_row, x_col, w_col, r_row, r_col,
    norm_step, post_step, TOP_K: tl.constexpr, INDEXED: tl.constexpr, PERMUTED: tl.constexpr, HAS_MASK: tl.constexpr,
    PROJECTED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, HAS_B: tl.constexpr, GATED: tl.constexpr,
    ROUTED_SCALE: tl.constexpr, SCALE: tl.constexpr, HAS_POST: tl.constexpr, HAS_POST_WEIGHT: tl.constexpr,
    POST_EPS: tl.constexpr, POST_OFFSET: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr, PRECISE: tl.constexpr,
    INTERPRETED: tl.constexpr, DEPENDENT: tl.constexpr, GROUP: tl.constexpr, VECTOR: tl.constexpr,
    K: tl.constexpr, H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program computes one row, since the norm needs all of it.

    Loads stand in the order in which they are needed, all ahead of the first sum over the row. The indices come first:
    what they point to waits for them; then x and w, for which that sum does. (The assembler puts the others behind the
    arithmetic on x. Held ahead of it they take as long from x's turn as they gain: 2.51 us for 2.26 at 32 x 4096, an H100.)
    """
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    lane = tl.arange(0, BLOCK_K)
    if WIDE:
        h = h.to(tl.int64)
        lane = lane.to(tl.int64)
    mask = h < H
    if DEPENDENT:
        gdc_wait()  # nothing before this reads or writes memory, the weights included
        gdc_launch_dependents()
    sources = ()
    for k in tl.static_range(TOP_K):
        source = row * TOP_K + k
        if INDEXED:
            source = tl.load(INVERSE + source * inverse_step).to(tl.int32 if NARROW else tl.int64)
            source = tl.where(source < 0, source + tl.num_programs(0) * TOP_K, source)  # from the end, as in indexing
            source = source.to(tl.int64)
        sources += (source,)
    if PROJECTED:
        X += tl.multiple_of(row * x_row, VECTOR)
        x, w = dot_operands(X, W, x_col, w_col, lane, K)
    if HAS_B:
        b = tl.load(B + tl.multiple_of(row * b_row, VECTOR) + h * b_col, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        at = tl.multiple_of(row * r_row, VECTOR)
        residual = tl.load(RESIDUAL + at + h * r_col, mask=mask, other=0.0)
    if HAS_NORM_WEIGHT:
        norm = tl.load(NORM + h * norm_step, mask=mask, other=0.0)
    if HAS_POST_WEIGHT:
        post = tl.load(POST + h * post_step, mask=mask, other=0.0)
    if TOP_K == 0:
        at = tl.multiple_of(row * a_row, VECTOR)
        y = unpacked(tl.load(A + at + h * a_col, mask=mask, other=0.0))
    else:
        y = tl.zeros([BLOCK_H], tl.float32)
    for first in tl.static_range(0, TOP_K, GROUP):
        parts = ()
        weights = ()
        masks = ()
        for k in tl.static_range(first, min(first + GROUP, TOP_K)):
            at = tl.multiple_of(sources[k] * a_row, VECTOR)
            parts += (tl.load(A + at + h * a_col, mask=mask, other=0.0),)
        # Or the assembler, to save registers, waits for a part before it asks for the next. The weights come behind the
        # barrier, so all the parts are on their way first. The sum over the row of a projection has one too.
        if not PROJECTED and GROUP >= TOP_K:
            tl.debug_barrier()
        for k in tl.static_range(first, min(first + GROUP, TOP_K)):
            slot = sources[k] if PERMUTED else row * TOP_K + k
            weights += (tl.load(WEIGHTS + slot * weight_step),)
            if HAS_MASK:
                masks += (tl.load(MASKED + sources[k] * masked_step),)
        for k in tl.static_range(min(GROUP, TOP_K - first)):
            part = unpacked(parts[k])
            if HAS_MASK:  # read all the same: a load that waits for its mask comes too late
                part = tl.where(masks[k], 0.0, part)
            y += unpacked(weights[k]) * part
    if ROUTED_SCALE != 1.0:
        y *= ROUTED_SCALE
    if GATED:
        if PROJECTED:
            logit = dot(x, w, X, W, x_col, w_col, lane, K, BLOCK_K)
            if HAS_BIAS:
                logit += unpacked(tl.load(BIAS))
        else:
            logit = unpacked(tl.load(GATE + row * gate_row))
        y += sigmoid(logit, PRECISE, INTERPRETED) * unpacked(b)
    elif HAS_B:
        y += unpacked(b)
    if SCALE != 1.0:
        y *= SCALE
    if HAS_POST:  # masked lanes are 0
        y *= tl.rsqrt(tl.sum(y * y) / H + POST_EPS)
        if HAS_POST_WEIGHT:
            y *= unpacked(post) + POST_OFFSET
    if HAS_RESIDUAL:
        y += unpacked(residual)
    to = tl.multiple_of(row * H, VECTOR) + h
    tl.store(SUM + to, rounded(y, SUM.dtype.element_ty, INTERPRETED), mask=mask)
    if HAS_NORM:  # of the sum before its rounding, as Inductor has it; masked lanes are 0
        normed = y * tl.rsqrt(tl.sum(y * y) / H + EPS)
        if HAS_NORM_WEIGHT:
            normed *= unpacked(norm) + OFFSET
        tl.store(NORMED + to, rounded(normed, NORMED.dtype.element_ty, INTERPRETED), mask=mask)
