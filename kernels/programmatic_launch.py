"""Programmatic dependent launch: a kernel may start while the one before it on the stream is still finishing.

It is safe because such a kernel first waits until every kernel on which it depends has completed and the writes are
visible. Before that it reads and writes nothing, not even the gate weight. (An earlier kernel of the stream, say an
optimizer step, may be writing the weight, and a kernel cannot know this.) So it computes the same bits either way.
It needs compute capability 9.0.
"""

from __future__ import annotations

import functools
import os

import torch

from .arithmetic import INTERPRETED


@functools.cache
def dependent_launch(device: int) -> bool:
    """Whether kernels of this CUDA device are launched in this way. FUSIONPASS_PDL=1 or 0 says so, read once; default:
    no."""
    chosen = os.environ.get("FUSIONPASS_PDL", "0")
    if chosen not in ("0", "1"):
        raise ValueError(f"FUSIONPASS_PDL is {chosen!r}, allowed: 0 or 1")
    if chosen == "0" or INTERPRETED or device < 0 or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)
