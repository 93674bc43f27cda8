"""Whether tensors share memory, told by addresses, sizes and strides. Only for real tensors: a tracer's have no address."""

from __future__ import annotations

from math import gcd

from torch import Tensor

from .layout import last_offset


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of the tensor may be the same in memory. Also True for some exotic interleaved strides."""
    span = 1  # elements from the first to the last one, both included, in the dims seen so far
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < span:
            return True
        span += stride * (size - 1)
    return False


def same_view(m: Tensor, n: Tensor) -> bool:
    """Whether each element of one tensor is, in memory, the element of the other at the same place."""
    if m.data_ptr() != n.data_ptr() or m.shape != n.shape:
        return False
    return all(s == t for size, s, t in zip(m.shape, m.stride(), n.stride(), strict=True) if size > 1)


def disjoint(m: Tensor, n: Tensor) -> bool:
    """Whether two tensors of one dtype provably have no byte in common: by range, or column by column.

    Columns: let `period` divide every stride except those of the last dims. Then each tensor stays in one interval of
    addresses modulo `period`. If the two intervals do not meet, the tensors are disjoint.
    """
    if m.numel() == 0 or n.numel() == 0:
        return True
    itemsize, starts, lengths, period, widths = m.element_size(), [], [], 0, []
    for tensor in (m, n):
        starts.append(tensor.data_ptr())
        lengths.append((last_offset(tensor.shape, tensor.stride()) + 1) * itemsize)
        loops = list(zip(tensor.shape, tensor.stride(), strict=True))
        period = gcd(period, *(stride * itemsize for size, stride in loops[:-1] if size > 1))
        widths.append((last_offset(*zip(*loops[-1:], strict=True)) + 1) * itemsize)
    gap = starts[1] - starts[0]
    if gap >= lengths[0] or -gap >= lengths[1]:
        return True
    return period > 0 and widths[0] <= gap % period <= period - widths[1]
