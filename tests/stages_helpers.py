"""What a site grew over, and operands, for the files that test one stage each."""

from __future__ import annotations

import torch
from programs import ALONE, WHOLE, checked, operands, stops

S = torch.sigmoid
T, K, H = 6, 2, 8
BF16, F32 = torch.bfloat16, torch.float32


def check(function, args, tracer, joined, code=None, stage=None):
    """One site, grown over `joined`; `stage` stayed outside by `code`, or without a code each for want of a neighbour."""
    (site,) = checked(function, args, tracer)
    assert site.stages == [name for name in WHOLE if name in ("gated_add", *joined)]
    found = stops(site)
    alone = {"gate_projection": "not-a-projection"} | ALONE
    if code is None:
        assert found == {name: why for name, why in alone.items() if name not in joined}
    else:
        assert found[stage] == code
    return site


def flat(table):
    """(name, code) of a table of near misses by code; None: it joins, around what it does not know."""
    return [(name, code) for code, programs in table.items() for name in programs]


def sums(dtype=F32):
    return operands((T, H), (T, H), (T, 1), (T, H), dtype=dtype)
