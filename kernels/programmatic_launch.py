"""Programmatic dependent launch: a kernel may start while the one before it on the stream is still finishing.

What makes it safe: the first thing such a kernel does is wait until every kernel it depends on has completed and its
writes are visible; nothing is read or written before, the gate weight included. (An earlier kernel of the stream, an
optimizer step say, may be writing the weight, and a kernel cannot know.) So it computes the same bits either way.
It needs compute capability 9.0.
"""

from __future__ import annotations

import functools
import os

import torch

from .arithmetic import INTERPRETED


@functools.cache
def dependent_launch(device: int) -> bool:
    """Whether kernels of this CUDA device are launched so: FUSIONPASS_PDL=1 or 0 says, read once; else they are not."""
    chosen = os.environ.get("FUSIONPASS_PDL", "0")
    if chosen not in ("0", "1"):
        raise ValueError(f"FUSIONPASS_PDL is {chosen!r}, allowed: 0 or 1")
    if chosen == "0" or INTERPRETED or device < 0 or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)
