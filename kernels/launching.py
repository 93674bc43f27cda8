"""Launch a kernel again without Triton's look at every argument.

Triton's ordinary launch binds, inspects and hashes all arguments on each call, which for our two dozen took 60 us of
CPU time on an H100 host: more than the eager kernels it replaces. But all that a compiled variant depends on is fixed
here except the pointers' dtype and alignment and the device, so the variant that the first ordinary launch returns is
kept under these three and launched directly from then on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arithmetic import INTERPRETED

# On AMD a variant also depends on the size of the memory behind a pointer; the interpreter compiles nothing.
REUSE = not INTERPRETED and torch.version.hip is None


class Launch:
    """A kernel with every argument but its pointers; `arguments` are in the kernel's order, constexprs included."""

    __slots__ = ("_arguments", "_kernel", "_options", "_variants")

    def __init__(self, kernel: Any, arguments: tuple[int | bool, ...], **options: Any):
        self._kernel = kernel
        self._arguments = arguments
        self._options = options
        self._variants: dict[tuple, Any] = {}

    def __call__(self, blocks: int, device: int, *pointers: Tensor) -> None:
        """Run `blocks` programs on the current stream of `device`, which must be the current device."""
        if not REUSE:
            self._kernel[(blocks,)](*pointers, *self._arguments, **self._options)
            return
        key = (device, pointers[0].dtype, *[pointer.data_ptr() % 16 for pointer in pointers])
        variant = self._variants.get(key)
        if variant is None:
            self._variants[key] = self._kernel[(blocks,)](*pointers, *self._arguments, **self._options)
        else:
            variant[(blocks, 1, 1)](*pointers, *self._arguments)
