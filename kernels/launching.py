"""Launch a kernel again, without Triton's inspection of every argument.

Triton's ordinary launch binds, inspects and hashes all arguments on each call. That costs the CPU more than the eager
kernels that a launch replaces. But here everything on which a compiled variant depends is fixed, except the alignment of the
pointers. So the variant that the first ordinary launch returns is kept. From then on its launcher is called directly, with
addresses for tensors. This takes a fifth of the time or less (fusionpass/bench/measured.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .arithmetic import INTERPRETED

# Not on AMD, where a variant also depends on the size of the memory behind a pointer. The interpreter compiles nothing.
REUSE = not INTERPRETED and torch.version.hip is None

_knobs = triton.knobs.runtime
# What Triton's own driver calls for the current device and stream. A torch without CUDA has neither.
_current_device = getattr(torch._C, "_cuda_getDevice", None)
# Inductor's own code allocates with this, on the current device. It takes half the time of `empty_like`.
_empty_strided_cuda = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def _heard() -> bool:
    """Whether anyone, say a profiler, listens to launches. A hook is a chain of functions, a function, or None."""
    enter, leave = _knobs.launch_enter_hook, _knobs.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _launcher(compiled: Any) -> tuple[Callable, tuple]:
    """The function that launches a compiled kernel, and its arguments between the stream and the kernel's own.

    Triton's launcher looks for scratch memory to allocate, and calls a function in C whose arguments differ between
    releases. If these arguments are known, the C function is called directly, which saves a fifth of the time.
    """
    run = compiled.run
    unheard = compiled.packed_metadata, None, None, None  # launch metadata and two hooks
    if triton.__version__.startswith("3.6.") and run.global_scratch_size == run.profile_scratch_size == 0:
        return run.launch, (compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None, *unheard)
    return run, (compiled.function, *unheard)


class Calls(dict):
    """Prepared calls by the layouts of their operands. If there are too many, the older half is forgotten."""

    LIMIT = 4096

    def keep(self, key: Any, call: Any) -> Any:
        if len(self) >= self.LIMIT:
            for old in list(self)[: self.LIMIT // 2]:
                self.pop(old, None)
        self[key] = call
        return call


# Keyed by kernel, device and all else on which a compiled kernel depends, then by which pointers are aligned. If every call
# has another layout, each has an entry here, so there is a limit, as for the calls. A call that is kept holds its own
# variants. A variant forgotten here comes back by one ordinary launch, since Triton keeps every kernel that it compiled.
_variants = Calls()


def in_order(kernel: Any, pointers: Sequence[str], numbers: Mapping[str, Any]) -> tuple:
    """The numbers, given by their names, in the order of the kernel's signature, which starts with the pointers.

    Raises:
        TypeError: the kernel's signature does not have these names.
    """
    names, count = kernel.arg_names, len(pointers)
    if list(names[:count]) != list(pointers) or set(names[count:]) != set(numbers):
        raise TypeError(f"{kernel} takes {', '.join(names)}; given: {', '.join((*pointers, *numbers))}")
    return tuple([numbers[name] for name in names[count:]])


def warps_for(columns: int, per_warp: int, most: int) -> int:
    """How many warps to launch: a power of two from 1 to `most`, so that each has at least `per_warp` of the columns."""
    return min(max(1 << (columns // per_warp).bit_length() >> 1, 1), most)


class Launch:
    """One kernel over `blocks` programs, with every argument but its pointers, on tensors of one device.

    `device` is the index of the device, -1 for the CPU. `arguments` follow the pointers in the kernel's order, constexprs
    included: see `in_order`. `compiled_for` is everything else on which the compiled kernel depends. Launches with the same
    `compiled_for` share variants. The number of rows is not in it, so for a new one the arguments are not inspected again.
    """

    __slots__ = ("_arguments", "_blocks", "_device", "_elsewhere", "_kernel", "_options", "_variants")

    def __init__(
        self,
        kernel: Any,
        device: int,
        blocks: int,
        arguments: Sequence[int | bool],
        compiled_for: tuple,
        **options: Any,
    ):
        self._kernel = kernel
        self._device = device
        self._elsewhere = device >= 0 and torch.cuda.device_count() > 1  # another device may be the current one
        self._blocks = blocks
        self._arguments = tuple(arguments)
        self._options = options
        key = id(kernel), device, compiled_for, *options.items()
        variants = _variants.get(key)
        self._variants = _variants.keep(key, {}) if variants is None else variants

    def __call__(self, *tensors: Tensor) -> None:
        """Run on the current stream of the device."""
        device = self._device
        if self._elsewhere and device != _current_device():
            with torch.cuda.device(device):
                return self(*tensors)
        if not REUSE:
            self._ordinary(tensors)
            return
        bits = 0
        addresses = [tensor.data_ptr() for tensor in tensors]
        for address in addresses:
            bits |= address
        # Triton compiles different variants for pointers that are aligned to 16 bytes and others. Nearly always all are.
        aligned = tuple([address & 15 == 0 for address in addresses]) if bits & 15 else True
        variant = self._variants.get(aligned)
        if variant is None or _heard():
            self._variants[aligned] = _launcher(self._ordinary(tensors))
            return
        run, leading = variant
        run(self._blocks, 1, 1, _current_stream(device), *leading, *addresses, *self._arguments)

    def _ordinary(self, tensors: Sequence[Tensor]) -> Any:
        return self._kernel[(self._blocks,)](*tensors, *self._arguments, **self._options)


class Launches:
    """Several launches. Each has the offsets at which it starts in the tensors, in elements."""

    __slots__ = ("_launches",)

    def __init__(self, launches: Sequence[tuple[Launch, Sequence[int]]]):
        self._launches = launches

    def __call__(self, *tensors: Tensor) -> None:
        for launch, offsets in self._launches:
            launch(*map(_at, tensors, offsets))


def prepared(launches: Sequence[tuple[Launch, Sequence[int]]]) -> Launch | Launches:
    """One call for these launches. Nearly always there is one launch, from the starts of the tensors."""
    if len(launches) == 1 and not any(launches[0][1]):
        return launches[0][0]
    return Launches(launches)


def _at(tensor: Tensor, offset: int) -> Tensor:
    """A tensor whose data pointer is that of `tensor` moved by `offset` elements."""
    return tensor if offset == 0 else tensor.as_strided((1,), (1,), tensor.storage_offset() + offset)


class Result:
    """Memory for a result on the device of `a`, with the given strides, and the given dtype and shape or those of `a`."""

    __slots__ = ("_current", "_dtype", "_shape", "_strides")

    def __init__(
        self,
        a: Tensor,
        strides: Sequence[int],
        dtype: torch.dtype | None = None,
        shape: Sequence[int] | None = None,
    ):
        self._current = a.is_cuda and torch.cuda.device_count() == 1 and _empty_strided_cuda is not None
        self._shape = tuple(a.shape if shape is None else shape)
        self._strides = tuple(strides)
        self._dtype = dtype or a.dtype

    def empty(self, a: Tensor) -> Tensor:
        if self._current:
            return _empty_strided_cuda(self._shape, self._strides, self._dtype)
        return torch.empty_strided(self._shape, self._strides, dtype=self._dtype, device=a.device)


def layouts(*tensors: Tensor | None) -> tuple:
    """For each tensor, everything on which a prepared call depends."""
    return tuple([None if t is None else (t.shape, t.stride(), t.dtype, t.get_device()) for t in tensors])
