"""gated_add_backward: db = dy * s;  dgate = rowsum(dy * b) * s * (1 - s);  s = sigmoid(gate)

shapes    dy, b, db: [..., H]   gate, dgate: [..., 1]
strides   contiguous; H up to 8192. Any other layout, and mixed dtypes, use the same formulas in ATen
dtypes    bf16, fp16, fp32, one for all; arithmetic and row sums in fp32, one rounding at the store
traffic   rows * (3 * H + 2) * itemsize; eager's five kernels move rows * (7 * H + 5) * itemsize
"""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import INTERPRETED, rounded, sigmoid, widened
from .launch_limits import GRID_LIMIT, needs_int64
from .launching import Calls, Launch, in_order, layouts, warps_for

COLUMNS_LIMIT = 8192  # 16 columns per thread of 16 warps; with 32 columns, registers spill
# One block per row is faster than two of half its length, and than torch.compile's kernel: see fusionpass/bench/measured.md.
COLUMNS_PER_WARP = 256
MOST_WARPS = 16
POINTERS = ("DY", "G", "B", "DG", "DB")


@triton.jit
def gated_add_backward_kernel(
    DY, G, B, DG, DB, H: tl.constexpr, WIDE: tl.constexpr, PRECISE: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program computes one row."""
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    h = tl.arange(0, BLOCK)
    dy = widened(tl.load(DY + row * H + h, mask=h < H, other=0.0), INTERPRETED)
    b = widened(tl.load(B + row * H + h, mask=h < H, other=0.0), INTERPRETED)
    s = sigmoid(widened(tl.load(G + row), INTERPRETED), PRECISE, INTERPRETED)
    tl.store(DB + row * H + h, rounded(dy * s, DB.dtype.element_ty, INTERPRETED), mask=h < H)
    dg = tl.sum(dy * b) * s * (1.0 - s)
    tl.store(DG + row, rounded(dg, DG.dtype.element_ty, INTERPRETED))


def fits(dy: Tensor, gate: Tensor, b: Tensor) -> bool:
    """Whether the kernel takes these layouts and dtypes. The caller must check devices."""
    return (
        dy.dtype == gate.dtype == b.dtype
        and gate.shape == (*dy.shape[:-1], 1)
        and 0 < dy.shape[-1] <= COLUMNS_LIMIT
        and 0 < gate.numel() <= GRID_LIMIT
        and dy.is_contiguous()
        and gate.is_contiguous()
        and b.is_contiguous()
    )


_calls = Calls()


def gradients(dy: Tensor, gate: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, db), new tensors, for operands that fit."""
    key = layouts(dy, gate, b)
    call = _calls.get(key) or _calls.keep(key, _prepared(dy))
    dgate, db = torch.empty_like(gate), torch.empty_like(b)
    call(dy, gate, b, dgate, db)
    return dgate, db


def _prepared(dy: Tensor) -> Launch:
    h, rows = dy.shape[-1], prod(dy.shape[:-1])
    block = triton.next_power_of_2(h)
    warps = warps_for(h, COLUMNS_PER_WARP, MOST_WARPS)
    numbers = {
        "H": h,
        "WIDE": needs_int64(rows * h + block),
        "PRECISE": dy.dtype == torch.float32,
        "INTERPRETED": INTERPRETED,
        "BLOCK": block,
    }
    arguments = in_order(gated_add_backward_kernel, POINTERS, numbers)
    compiled_for = (dy.dtype, *arguments)
    return Launch(gated_add_backward_kernel, dy.get_device(), rows, arguments, compiled_for, num_warps=warps)
