"""Whole numbers on the command line."""

from __future__ import annotations

import argparse

DIGITS = 18  # what fits in 64 bits; no size, count or length has more


def whole_number(text: str, least: int, why: str = "") -> int:
    """The number that `text` is.

    Raises:
        ArgumentTypeError: it is no whole number, or below `least`, or too large for any count.
    """
    if not is_whole(text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} up{why}")
    return int(text)


def is_whole(text: str) -> bool:
    """Whether `text` is digits alone.

    Raises:
        ArgumentTypeError: they are too many.
    """
    if not text.isascii() or not text.isdecimal():
        return False
    if len(text.lstrip("0")) > DIGITS:
        shown = text if len(text) <= 40 else f"{text[:20]}...{text[-4:]}"
        raise argparse.ArgumentTypeError(f"{shown!r} is too large: it takes at most {DIGITS} digits")
    return True
