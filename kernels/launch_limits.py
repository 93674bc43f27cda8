"""How far a launch can reach: by its grid and by 32-bit offsets."""

from __future__ import annotations

GRID_LIMIT = 2**31 - 1  # CUDA's largest grid.x


def needs_int64(largest: int) -> bool:
    """Whether an index that reaches `largest` overflows 32 bits."""
    return largest > 2**31 - 1
