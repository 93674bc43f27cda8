"""Short words for many things: counts, module paths as ranges, node names by their common part."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_NUMBERED = re.compile(r"(_\d+)+$")


def count(number: int, noun: str) -> str:
    """`1 graph`, `2 graphs`, `2 near misses`."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def ranges(paths: Iterable[str]) -> list[str]:
    """Dotted paths, in which the numbers that differ are written as ranges: `layers.{0..47}.mlp`.

    A constant step above one is written as in a shell, `{3..47..4}`. If several numbers vary, the last one is folded.
    """
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for path in dict.fromkeys(paths):
        parts = path.split(".")
        groups.setdefault(tuple("#" if part.isdecimal() else part for part in parts), []).append(parts)
    return [line for members in groups.values() for line in _folded(members)]


def _folded(members: list[list[str]]) -> list[str]:
    varying = [at for at in range(len(members[0])) if len({parts[at] for parts in members}) > 1]
    if not varying:
        return [".".join(members[0])]
    last = varying[-1]
    runs: dict[tuple[str, ...], list[int]] = {}
    for parts in members:
        runs.setdefault((*parts[:last], "#", *parts[last + 1 :]), []).append(int(parts[last]))
    return [
        ".".join(_number_set(sorted(set(numbers))) if p == "#" else p for p in key) for key, numbers in runs.items()
    ]


def _number_set(numbers: list[int]) -> str:
    """`7`, `{0,1}`, `{0..47}`, `{3..47..4}`, `{0..2,5,9..11}`."""
    if len(numbers) == 1:
        return str(numbers[0])
    step = numbers[1] - numbers[0]
    if step > 1 and len(numbers) > 3 and all(b - a == step for a, b in zip(numbers, numbers[1:], strict=False)):
        return f"{{{numbers[0]}..{numbers[-1]}..{step}}}"
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    words = [str(a) if a == b else f"{a},{b}" if b == a + 1 else f"{a}..{b}" for a, b in spans]
    return "{" + ",".join(words) + "}"


def stem(name: str) -> str:
    """A node name without its number: `linear_8` -> `linear`."""
    return _NUMBERED.sub("", name)


def common(names: Sequence[str]) -> str:
    """The name if there is only one, else the common part: `linear_8`, `linear_17` -> `linear*`."""
    return names[0] if len(set(names)) == 1 else stem(names[0]) + "*"


def skeleton(path: str) -> str:
    """`path` with its numbers blanked. It is equal for the same module of similar layers."""
    return ".".join("#" if part.isdecimal() else part for part in path.split("."))
