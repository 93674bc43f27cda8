"""`with collect() as report:` gathers what is compiled inside, by any entry point, and counts how often it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from fusionpass.entry.calls import local
from fusionpass.entry.no_graph import why_off
from fusionpass.report import Report
from fusionpass.report.records import GraphBreak, Outcome


@dataclass
class Collector:
    """A report being filled; it stops counting when its `with` block ends."""

    report: Report = field(default_factory=Report)
    keep_code: bool = False
    active: bool = True


_COMPILED_BEFORE = (
    "0 rewritten: no graph was compiled, since those that ran had been compiled before: collect from the first call on, or "
    "use fusionpass.explain, which compiles them again"
)
_collectors: ContextVar[tuple[Collector, ...]] = ContextVar("fusionpass_collectors", default=())


@contextmanager
def collect() -> Iterator[Report]:
    """A `Report` of everything compiled inside the block, in this thread or task.

    What was compiled before the block is not compiled again, so it is not in the report. If this leaves the report without a
    graph, the report says so. `explain` compiles everything again instead.

    Example:
        >>> with fusionpass.collect() as report:
        ...     model(x)
        >>> print(report)
    """
    with collector() as active:
        yield active.report


@contextmanager
def collector(*, keep_code: bool = False, target: str = "") -> Iterator[Collector]:
    """`collect` with the collector itself, for callers that need the graphs' code or want to name the target."""
    new = Collector(Report(target=target), keep_code=keep_code)
    token = _collectors.set((*_collectors.get(), new))
    before, local.state.ran = local.state.ran, 0
    try:
        yield new
    finally:
        new.active = False
        _collectors.reset(token)
        if local.state.ran:
            new.report.note_no_graph(_COMPILED_BEFORE)
        elif off := why_off():
            new.report.note_no_graph(f"0 rewritten: no graph was compiled, since {off}")
        local.state.ran |= before


def no_graph(why: str) -> None:
    """Tell every active report why a call inside its block ran no graph."""
    for active in _collectors.get():
        active.report.note_no_graph(why)


def wants_code() -> bool:
    return any(active.keep_code for active in _collectors.get())


def record(
    outcome: Outcome, *, compiled: bool, graph_break: GraphBreak | None = None, code: tuple[str, str] | None = None
) -> Callable[[], None] | None:
    """Add one graph to every active report. Returns what to call on each run of the graph, None if nobody collects."""
    entries = [(active, _add(active, outcome, compiled, graph_break, code)) for active in _collectors.get()]
    if not entries:
        return None

    def ran() -> None:
        for active, records in entries:
            if active.active:
                for entry in records:
                    entry.calls += 1

    return ran


def _add(active: Collector, outcome: Outcome, compiled: bool, graph_break: GraphBreak | None, code) -> list[Any]:
    if graph_break is not None:
        active.report.graph_breaks.append(graph_break)
    return active.report.add(outcome, compiled=compiled, code=code if active.keep_code else None)


def counted(run: Callable[..., Any], ran: Callable[[], None] | None) -> Callable[..., Any]:
    """`run` with a count of its calls. If nobody collects, `run` itself, so that an ordinary call costs nothing more."""
    if ran is None:
        return run

    def counting(*args: Any) -> Any:
        ran()
        return run(*args)

    return counting
