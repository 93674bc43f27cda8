"""What both launchers share: where a launch starts reading, on which device, and how wide its offsets are."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

GRID_LIMIT = 2**31 - 1  # CUDA's largest grid.x


def at(tensor: Tensor, offset: int) -> Tensor:
    """A tensor whose data pointer is that of `tensor` moved by `offset` elements."""
    return tensor if offset == 0 else tensor.as_strided((1,), (1,), tensor.storage_offset() + offset)


def on_device_of(tensor: Tensor):
    """Triton launches on the current device and stream; make that the tensor's device."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def needs_int64(largest: int) -> bool:
    """Whether an index that reaches `largest` overflows 32 bits."""
    return largest > 2**31 - 1
