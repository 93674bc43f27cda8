"""What fits in memory? Asked before a machine starts to swap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fusionpass.targets.config import text_part
from fusionpass.targets.types import TargetError

MOST_TOKENS = 2**31 - 1  # of one call; kernels count rows in 32 bits
MOST_BYTES = 2**63 - 1  # torch counts a tensor's bytes in 64 bits


def bytes_needed(sizes: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a tensor, as a Python integer, which does not overflow. A size above 64 bits counts even if another is 0."""
    return max(math.prod(sizes) * dtype.itemsize, *sizes, 0)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on the device; None if this is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux: nothing is refused
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def obstacle(needed: int, device: torch.device) -> str:
    """Why the device cannot give so many bytes, as "it would take 8 GB and 4 GB are free on cpu"; "" if it can."""
    if needed > MOST_BYTES:
        return "a tensor has at most 2^63 bytes"
    free = free_memory(device)
    if free is not None and needed > free:
        return f"it would take {needed / 1e9:,.1f} GB and {free / 1e9:,.1f} GB are free on {device}"
    return ""


def ensure_countable(tokens: int, batch: int) -> None:
    """Refuse sizes that are too large for any call, before anything is built."""
    if batch * tokens > MOST_TOKENS:
        raise TargetError(
            f"--batch {batch} --tokens {tokens} makes {batch * tokens:,} tokens, and a call has at most "
            f"{MOST_TOKENS:,}: make one of them smaller"
        )


def ensure_room(config: Any, tokens: int, batch: int, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a call that needs more than the free memory. It takes at least the ids, one hidden state and the logits."""
    if device.type == "meta":
        return
    part = text_part(config)
    hidden, vocabulary = (getattr(part, name, None) for name in ("hidden_size", "vocab_size"))
    wide = [size for size in (hidden, vocabulary) if isinstance(size, int)]
    needed = bytes_needed([batch, tokens], torch.int64) + sum(
        bytes_needed([batch, tokens, size], dtype) for size in wide
    )
    why = obstacle(needed, device)
    if why:
        raise TargetError(
            f"a call of --batch {batch} --tokens {tokens} is too large: {why}; make one smaller, or use --device meta"
        )


def ensure_fits(on_meta: torch.nn.Module, device: torch.device) -> None:
    """Refuse weights that need more than the free memory, before the machine starts to swap."""
    needed = sum(value.nbytes for value in (*on_meta.parameters(), *on_meta.buffers()))
    free = free_memory(device)
    if free is not None and needed > free:
        raise TargetError(
            f"the weights take {needed / 1e9:.1f} GB on {device} and {free / 1e9:.1f} GB are free: "
            "use --device meta, or --layers N for a shorter model"
        )
