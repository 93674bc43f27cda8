"""Compare a run with an earlier one, by ratios to the other sides. From day to day, ratios stay comparable and times do not.

A ratio has worsened when both hold:

    new > old * (1 + tolerance)
    new - old > old noise + new noise

The noise of a ratio here/base is its value times (spread of here / here + spread of base / base). So a difference within
the spreads of the two runs is never reported, even with a very small tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusionpass.bench.cases import Case
from fusionpass.bench.results import Ratio, Run

HOST_SIDES = ("here", "rewritten")


@dataclass(frozen=True)
class Worsened:
    """A ratio that grew by more than was allowed."""

    case: Case
    name: str
    old: float
    new: float

    def line(self, tolerance: float) -> str:
        """For example `gate_projected_add 32 x 4096: here/compile 0.24 -> 0.31 (+29%, allowed +5%)`."""
        digits = 2
        while digits < 5 and f"{self.old:.{digits}f}" == f"{self.new:.{digits}f}":
            digits += 1
        change = f"{self.name} {self.old:.{digits}f} -> {self.new:.{digits}f}"
        return f"{self.case}: {change} (+{100 * (self.new / self.old - 1):.3g}%, allowed +{100 * tolerance:g}%)"


@dataclass(frozen=True)
class Comparison:
    """How many ratios two runs have in common, in how many cases, and which ratios have worsened."""

    cases: int
    ratios: int
    worsened: list[Worsened]


def ratios_of(run: Run) -> dict[tuple[Case, str], Ratio]:
    """Every ratio of a run by its case and name, such as "here/compile" or "CPU here/eager"."""
    found = {}
    for measurement in run.measurements:
        for base, ratio in run.ratios(measurement).items():
            found[measurement.case, f"here/{base}"] = ratio
    for cost in run.cpu:
        case = Case(cost.op, cost.tokens, cost.hidden, cost.dtype)
        for side in HOST_SIDES:
            if side in cost.sides:
                found[case, f"CPU {side}/eager"] = Ratio.of(cost.sides[side], cost.sides["eager"])
    return found


def compare(baseline: Run, run: Run, tolerance: float) -> Comparison:
    """Compare the ratios of `run` that are in `baseline` too. `tolerance` is a fraction, 0.05 for 5%."""
    old, new = ratios_of(baseline), ratios_of(run)
    common = [key for key in new if key in old]
    worsened = [
        Worsened(*key, old[key].value, new[key].value) for key in common if _worse(old[key], new[key], tolerance)
    ]
    return Comparison(len({case for case, _ in common}), len(common), worsened)


def _worse(old: Ratio, new: Ratio, tolerance: float) -> bool:
    return new.value > old.value * (1 + tolerance) and new.value - old.value > old.noise + new.noise
