"""Strides as integers: the strides that TensorIterator gives an elementwise result, and the fewest loops over tensors.

Sizes and strides are tuples of ints, strides in elements. Strides of size-1 dims have no meaning, neither in arguments
nor in results.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

Ints = Sequence[int]


def broadcast_strides(shape: Ints, from_shape: Ints, strides: Ints) -> tuple[int, ...]:
    """The strides with which a tensor of `from_shape` is read as one of `shape`: 0 along every broadcast dim."""
    missing = len(shape) - len(from_shape)
    kept = (0 if m == 1 and n != 1 else s for n, m, s in zip(shape[missing:], from_shape, strides, strict=True))
    return (0,) * missing + tuple(kept)


def _in_order(shape: Ints, strides: Ints, dims: Ints) -> bool:
    """Whether a tensor fills its memory without gaps; `dims` go from the slowest to the fastest."""
    step = 1
    for dim in reversed(dims):
        if shape[dim] != 1:
            if strides[dim] != step:
                return False
            step *= shape[dim]
    return True


def _strides_in_order(shape: Ints, dims: Ints) -> tuple[int, ...]:
    """Strides of a tensor that fills its memory without gaps; `dims` go from the slowest to the fastest."""
    strides, step = [0] * len(shape), 1
    for dim in reversed(dims):
        strides[dim] = step
        step *= shape[dim]
    return tuple(strides)


def contiguous_strides(shape: Ints) -> tuple[int, ...]:
    """Row-major strides of `shape`."""
    return _strides_in_order(shape, range(len(shape)))


def elementwise_strides(shape: Ints, *operands: tuple[Ints, Ints]) -> tuple[int, ...]:
    """Strides of the fresh result of an eager elementwise op, from its operands' (shape, strides).

    This is TensorIterator's rule. If no operand needs a broadcast, and all are contiguous, all channels-last, or all dense
    with the same strides, the result has these strides. This includes those of size-1 dims, which matter for the next op.
    """
    if all(tuple(operand) == tuple(shape) for operand, _ in operands):
        for dims in (range(len(shape)), *([(0, 2, 3, 1)] if len(shape) == 4 else [])):
            if all(_in_order(shape, strides, dims) for _, strides in operands):
                return _strides_in_order(shape, dims)
        first = tuple(operands[0][1])
        by_stride = sorted(range(len(shape)), key=lambda dim: -first[dim])
        if all(tuple(strides) == first for _, strides in operands) and _in_order(shape, first, by_stride):
            return first
    return _strides_in_order(shape, _slowest_first(shape, [broadcast_strides(shape, *operand) for operand in operands]))


def _slowest_first(shape: Ints, operands: Sequence[Ints]) -> list[int]:
    """The dims in the order in which TensorIterator lays out a result, from strides broadcast to `shape`.

    Start row-major and insertion-sort the dims, fastest first. The first operand in which both dims have non-zero,
    different strides decides. If the strides are equal, the longer dim becomes the slower one. This is not a total order, so
    the steps of the sort are part of the rule.
    """

    def compare(fast: int, slow: int) -> int:
        for strides in operands:
            m, n = strides[fast], strides[slow]
            if m == 0 or n == 0:
                continue
            if m != n:
                return -1 if m < n else 1
            if shape[fast] > shape[slow]:
                return 1
        return 0

    dims = list(reversed(range(len(shape))))
    for start in range(1, len(dims)):
        here = start
        for other in reversed(range(start)):
            verdict = compare(dims[other], dims[here])
            if verdict > 0:
                dims[other], dims[here] = dims[here], dims[other]
                here = other
            elif verdict < 0:
                break
    return dims[::-1]


def sum_strides(shape: Ints, a: Ints, gate_shape: Ints, gate: Ints, b: Ints) -> tuple[int, ...]:
    """Strides of eager's `a + torch.sigmoid(gate) * b`, where `a` and `b` have `shape`.

    These are three ops, so the rule is applied three times: to sigmoid(gate), then to the product, then to the sum.
    """
    sigmoid = elementwise_strides(gate_shape, (gate_shape, gate))
    product = elementwise_strides(shape, (gate_shape, sigmoid), (shape, b))
    return elementwise_strides(shape, (shape, a), (shape, product))


def collapse(shape: Ints, *operands: Ints, order: Ints | None = None) -> tuple[list[int], list[list[int]]]:
    """The fewest loops, slowest first, that visit all operands together: (sizes, strides of each operand).

    Size-1 dims are dropped, and neighbours are merged if every operand allows it. With `order`, the loops go in descending
    order of these strides, for better locality. Without it the dims keep their order (row-major).
    """
    dims = [dim for dim, n in enumerate(shape) if n != 1]
    if order is not None:
        dims.sort(key=lambda dim: -order[dim])
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in operands]
    for dim in dims:
        n = shape[dim]
        if sizes and all(kept[-1] == n * operand[dim] for kept, operand in zip(strides, operands, strict=True)):
            sizes[-1] *= n
            for kept, operand in zip(strides, operands, strict=True):
                kept[-1] = operand[dim]
        else:
            sizes.append(n)
            for kept, operand in zip(strides, operands, strict=True):
                kept.append(operand[dim])
    return sizes, strides


def last_offset(sizes: Ints, strides: Ints) -> int:
    """Offset of the element that is furthest from the first one, in elements."""
    return sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))


def row_runs(*operands: tuple[Ints, Ints]) -> tuple[int, list[int]]:
    """The longest run of rows that has one stride in every operand: (rows per run, row stride of each operand).

    An operand is (sizes, strides) of its leading dims. All have the same number of rows, in any shape. In each of them,
    every multiple of the run length starts a run.
    """
    loops = [collapse(sizes, strides) for sizes, strides in operands]
    run = 0
    for sizes, _ in loops:
        run = gcd(run, sizes[-1] if sizes else 1)
    return run, [strides[0][-1] if sizes else 0 for sizes, strides in loops]


def row_offset(row: int, sizes: Ints, strides: Ints) -> int:
    """Offset of a row, in elements. Rows are counted in row-major order of the leading dims."""
    offset = 0
    for n, s in zip(reversed(sizes), reversed(strides), strict=True):
        offset += row % n * s
        row //= n
    return offset
