"""What the pass did and left alone, over all graphs of one capture, as data; `Report` writes it down."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from fusionpass.report.records import GraphBreak, GraphRecord, Miss, Outcome, Rewrite
from fusionpass.report.wording import count
from fusionpass.rules import RULES

_NO_GRAPH = (
    "0 rewritten: no graph was compiled with fusionpass: nothing uses the backend or `fuse`, or what ran was compiled "
    "before (fusionpass.explain compiles it again), or it has no tensor operation that Dynamo sees"
)


@dataclass
class Findings:
    """What a `Report` says, as data."""

    target: str = ""
    rewrites: list[Rewrite] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    graphs: list[GraphRecord] = field(default_factory=list)
    graph_breaks: list[GraphBreak] = field(default_factory=list)
    _switched_off: bool = field(default=False, repr=False)
    _no_graph: str = field(default="", repr=False)
    _absent: list[str] = field(default_factory=list, repr=False)  # what the rules say if they have no reading at all

    @property
    def executed(self) -> int:
        """How many rewritten sites ran. A site in a graph that layers share counts once per run.

        A graph that was given to `rewrite` counts once, since its runs are not seen.
        """
        return sum(r.calls if self.graphs[r.graph].compiled else 1 for r in self.rewrites)

    def add(self, outcome: Outcome, *, compiled: bool, code: tuple[str, str] | None = None) -> list[Any]:
        """Add one graph, with copies of its records. Returns the new records, the graph's own first."""
        index = len(self.graphs)
        before, after = code or (None, None)
        counts = outcome.nodes, len(outcome.rewrites), len(outcome.misses)
        graph = GraphRecord(index, *counts, 0, compiled, before, after)
        rewrites = [replace(rewrite, graph=index) for rewrite in outcome.rewrites]
        misses = [replace(miss, graph=index) for miss in outcome.misses]
        self._switched_off |= outcome.switched_off
        self._absent += [each for each in outcome.absent if each not in self._absent]
        self.graphs.append(graph)
        self.rewrites += rewrites
        self.misses += misses
        return [graph, *rewrites, *misses]

    def note_no_graph(self, why: str) -> None:
        """Keep the first sentence given, in case no graph is added."""
        self._no_graph = self._no_graph or why

    def top_reasons(self, most: int = 3) -> list[tuple[int, Miss]]:
        """The most frequent miss codes, as (how many, an example), most frequent first."""
        counts = Counter(miss.code for miss in self.misses)
        first = {}
        for miss in self.misses:
            first.setdefault(miss.code, miss)
        return [(count, first[code]) for code, count in counts.most_common(most)]

    def why_nothing(self, most: int = 3) -> str:
        """Why nothing was rewritten, in one sentence: no candidate at all, or the most frequent reasons."""
        if not self.graphs:
            return self._no_graph or _NO_GRAPH
        if self._switched_off:
            return (
                "0 rewritten: torch._inductor.config.disabled_passes or the compiler bisector switched fusionpass off"
            )
        where = f"in {count(len(self.graphs), 'graph')}"
        if not self.misses:
            absent = self._absent or [rule.absent for rule in RULES]
            return f"0 rewritten {where}: {'; '.join(absent)}"
        top = [f"{n} x {miss.code} ({' '.join(miss.reason.split())})" for n, miss in self.top_reasons(most)]
        return f"0 rewritten {where}, {count(len(self.misses), 'near miss')}: {'; '.join(top)}"
