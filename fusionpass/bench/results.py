"""A run's results: the measurements, the ratios computed from them, and the file that keeps them.

Times are in microseconds per call. A `Timing` is the median of its samples, with a spread: half of the range of the samples.
If the difference of two times is below the sum of their spreads, they are a tie: which one is faster is not known.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from fusionpass.bench.cases import DTYPES, OPS, Case

FORMAT = "fusionpass bench"
VERSION = 1
BASES = ("eager", "compile", "tuned", "limit")  # what `here` is divided by


class Timing(NamedTuple):
    """Microseconds per call."""

    median_us: float
    spread_us: float

    @classmethod
    def of(cls, samples: Sequence[float], *, outliers: int = 0) -> Timing:
        """Median of the samples. The spread leaves out the `outliers` fastest ones and as many slowest ones."""
        kept = sorted(samples)[outliers : len(samples) - outliers]
        return cls(statistics.median(samples), (kept[-1] - kept[0]) / 2)


class Ratio(NamedTuple):
    """here / base, and its noise: the value times the sum of both sides' relative spreads."""

    value: float
    noise: float

    @classmethod
    def of(cls, here: Timing, base: Timing) -> Ratio:
        value = here.median_us / base.median_us
        return cls(value, value * (here.spread_us / here.median_us + base.spread_us / base.median_us))

    @property
    def tie(self) -> bool:
        return abs(self.value - 1) < self.noise


@dataclass(frozen=True)
class Measurement:
    """GPU time of one case: side -> Timing; `bytes` is what the formula has to move."""

    op: str
    tokens: int
    hidden: int
    dtype: str
    bytes: int
    sides: dict[str, Timing]

    @property
    def case(self) -> Case:
        return Case(self.op, self.tokens, self.hidden, self.dtype)


@dataclass(frozen=True)
class HostCost:
    """CPU time of one call without gradients at one shape: side -> Timing."""

    op: str
    tokens: int
    hidden: int
    dtype: str
    sides: dict[str, Timing]


@dataclass(frozen=True)
class Run:
    """Everything one run measured.

    Attributes:
        device: name of the GPU.
        copy_gbps, copy_spread_gbps: bandwidth of a device copy, bytes read and written, in 1e9 bytes per second.
        rounds: how many samples a Timing of `measurements` has.
        sets: how many sets of operands each case rotated through; None: as many as read twice the L2 cache.
    """

    device: str
    torch: str
    triton: str
    fusionpass: str
    copy_gbps: float
    copy_spread_gbps: float
    rounds: int
    sets: int | None
    measurements: list[Measurement]
    cpu: list[HostCost]

    def limit(self, measurement: Measurement) -> Timing:
        """The time in which a copy moves the bytes of the formula."""
        us = measurement.bytes / (self.copy_gbps * 1e3)
        return Timing(us, us * self.copy_spread_gbps / self.copy_gbps)

    def ratios(self, measurement: Measurement) -> dict[str, Ratio]:
        """`here` over each of BASES that was measured, by the base's name."""
        sides = {**measurement.sides, "limit": self.limit(measurement)}
        return {base: Ratio.of(sides["here"], sides[base]) for base in BASES if base in sides}

    def to_json(self) -> str:
        fields = asdict(self)
        for entry in (*fields["measurements"], *fields["cpu"]):
            entry["sides"] = {side: timing._asdict() for side, timing in entry["sides"].items()}
        return json.dumps({"format": FORMAT, "version": VERSION, **fields}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Run:
        """The run that `to_json` wrote.

        Raises:
            ValueError: the text is not JSON, or not a run of this version; one sentence says what is wrong.
        """
        try:
            given = json.loads(text)
        except ValueError as error:
            raise ValueError(f"it is not JSON ({error})") from error
        if not isinstance(given, dict) or given.get("format") != FORMAT:
            raise ValueError(f"it is JSON but no run: its 'format' is not {FORMAT!r}")
        if given.get("version") != VERSION:
            raise ValueError(f"it has version {given.get('version')!r} of the format, this fusionpass reads {VERSION}")
        if given.get("measurements") == []:
            raise ValueError("the run has no measurements")
        return cls(
            **{name: _text(given, name, "the run") for name in ("device", "torch", "triton", "fusionpass")},
            copy_gbps=_number(given, "copy_gbps", "the run", positive=True),
            copy_spread_gbps=_number(given, "copy_spread_gbps", "the run"),
            rounds=_count(given, "rounds", "the run"),
            sets=None if given.get("sets") is None else _count(given, "sets", "the run"),
            measurements=[
                _measurement(entry, i) for i, entry in enumerate(_take(given, "measurements", list, "the run"))
            ],
            cpu=[_host_cost(entry, i) for i, entry in enumerate(_take(given, "cpu", list, "the run"))],
        )


def _measurement(entry: Any, index: int) -> Measurement:
    where = f"measurements[{index}]"
    case = _case(entry, where)
    return Measurement(*case, _count(entry, "bytes", where), _sides(entry, where, needed=("eager", "here")))


def _host_cost(entry: Any, index: int) -> HostCost:
    where = f"cpu[{index}]"
    return HostCost(*_case(entry, where), _sides(entry, where, needed=("eager", "here")))


def _case(entry: Any, where: str) -> Case:
    op, dtype = _text(entry, "op", where), _text(entry, "dtype", where)
    if op not in OPS:
        raise ValueError(f"{where} has the unknown op {op!r}")
    if dtype not in DTYPES:
        raise ValueError(f"{where} has the unknown dtype {dtype!r}")
    return Case(op, _count(entry, "tokens", where), _count(entry, "hidden", where), dtype)


def _sides(entry: Any, where: str, needed: Sequence[str]) -> dict[str, Timing]:
    sides = {}
    for side, timing in _take(entry, "sides", dict, where).items():
        at = f"{where}, side {side!r},"
        sides[side] = Timing(_number(timing, "median_us", at, positive=True), _number(timing, "spread_us", at))
    for side in needed:
        if side not in sides:
            raise ValueError(f"{where} lacks the side {side!r}")
    return sides


def _take(entry: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    if not isinstance(entry, dict) or name not in entry:
        raise ValueError(f"{where} lacks {name!r}")
    if not isinstance(entry[name], kind) or isinstance(entry[name], bool):
        raise ValueError(f"{where} has {name!r} of type {type(entry[name]).__name__}")
    return entry[name]


def _text(entry: Any, name: str, where: str) -> str:
    return _take(entry, name, str, where)


def _count(entry: Any, name: str, where: str) -> int:
    value = _take(entry, name, int, where)
    if value < 1:
        raise ValueError(f"{where} has {name!r} {value}, which is below 1")
    return value


def _number(entry: Any, name: str, where: str, *, positive: bool = False) -> float:
    value = _take(entry, name, (int, float), where)
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{where} has {name!r} {value}, which is out of range")
    return float(value)
