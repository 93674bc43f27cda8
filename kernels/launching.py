"""Launch a kernel again without Triton's look at every argument.

Triton's ordinary launch binds, inspects and hashes all arguments on each call: 25 us of CPU time with ten of them, 60 with
two dozen, on an H100 host; more than the eager kernels that a launch replaces. But all that a compiled variant depends
on is fixed here except the alignment of the pointers. So the variant that the first ordinary launch returns is kept,
and from then on its launcher is called directly, with addresses for tensors: 4.7 us on an H200 host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from .arithmetic import INTERPRETED
from .layout import contiguous_strides

# On AMD a variant also depends on the size of the memory behind a pointer; the interpreter compiles nothing.
REUSE = not INTERPRETED and torch.version.hip is None


class Launch:
    """One kernel over `blocks` programs, with every argument but its pointers, for tensors of one device.

    `arguments` are in the kernel's order, constexprs included, and follow the pointers.
    """

    __slots__ = ("_arguments", "_blocks", "_kernel", "_options", "_variants")

    def __init__(self, kernel: Any, blocks: int, arguments: Sequence[int | bool], **options: Any):
        self._kernel = kernel
        self._blocks = blocks
        self._arguments = tuple(arguments)
        self._options = options
        self._variants: dict[Any, tuple[Callable, Any, Any]] = {}

    def __call__(self, device: int, *tensors: Tensor) -> None:
        """Run on the current stream of `device`, which must be the current device."""
        if not REUSE:
            self._ordinary(tensors)
            return
        addresses = [tensor.data_ptr() for tensor in tensors]
        bits = 0
        for address in addresses:
            bits |= address
        # Triton compiles for pointers of 16 bytes and for others: nearly always all of them are the former.
        aligned = 0 if bits & 15 == 0 else tuple([address & 15 == 0 for address in addresses])
        variant = self._variants.get(aligned)
        hooks = triton.knobs.runtime  # a profiler's
        if variant is None or hooks.launch_enter_hook is not None or hooks.launch_exit_hook is not None:
            compiled = self._ordinary(tensors)
            self._variants[aligned] = compiled.run, compiled.function, compiled.packed_metadata
            return
        run, function, metadata = variant
        stream = triton.runtime.driver.active.get_current_stream(device)
        run(self._blocks, 1, 1, stream, function, metadata, None, None, None, *addresses, *self._arguments)

    def _ordinary(self, tensors: Sequence[Tensor]) -> Any:
        return self._kernel[(self._blocks,)](*tensors, *self._arguments, **self._options)


class Prepared:
    """A call worked out from the layouts of its operands: launches, and for each the offsets at which they start.

    Offsets are in elements, one for each tensor of the call. Nearly every call is one launch at the tensors' starts.
    """

    __slots__ = ("_launches", "_only")

    def __init__(self, launches: Sequence[tuple[Launch, Sequence[int]]]):
        self._launches = launches
        self._only = launches[0][0] if len(launches) == 1 and not any(launches[0][1]) else None

    def __call__(self, *tensors: Tensor) -> None:
        device = tensors[0].get_device()
        if self._only is not None and (device == -1 or device == torch.cuda.current_device()):
            self._only(device, *tensors)
            return
        with nullcontext() if device == -1 else torch.cuda.device(device):
            for launch, offsets in self._launches:
                launch(device, *map(_at, tensors, offsets))


def _at(tensor: Tensor, offset: int) -> Tensor:
    """A tensor whose data pointer is that of `tensor` moved by `offset` elements."""
    return tensor if offset == 0 else tensor.as_strided((1,), (1,), tensor.storage_offset() + offset)


class Result:
    """Memory for a result with the shape, dtype and device of `a`, and given strides."""

    __slots__ = ("_strides",)

    def __init__(self, a: Tensor, strides: Sequence[int]):
        # `empty_like` takes 1.7 us on an H200 host, `empty_strided` 2.9; it keeps the strides of a contiguous tensor.
        as_a = tuple(strides) == a.stride() == contiguous_strides(a.shape)
        self._strides = None if as_a else tuple(strides)

    def empty(self, a: Tensor) -> Tensor:
        if self._strides is None:
            return torch.empty_like(a)
        return torch.empty_strided(a.shape, self._strides, dtype=a.dtype, device=a.device)


class Calls(dict):
    """Prepared calls by the layouts of their operands; of the oldest half is forgotten when there are too many."""

    LIMIT = 4096

    def keep(self, key: Any, call: Any) -> Any:
        if len(self) >= self.LIMIT:
            for old in list(self)[: self.LIMIT // 2]:
                self.pop(old, None)
        self[key] = call
        return call


def layouts(*tensors: Tensor | None) -> tuple:
    """All that a prepared call depends on, of each tensor: 0.5 us for three of them."""
    return tuple([None if t is None else (t.shape, t.stride(), t.dtype, t.get_device()) for t in tensors])
