"""Report: everything the pass did and left alone, over all graphs of one capture."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from fusionpass._version import __version__
from fusionpass.report import render
from fusionpass.report.findings import Findings


@dataclass
class Report(Findings):
    """Rewritten sites, near misses, graphs and graph breaks, in capture order.

    Attributes:
        target: what was captured, in the user's words ("" when unknown).
        rewrites: one `Rewrite` per captured site that now runs as one op.
        misses: one `Miss` per near miss: a place that a rule could read as its formula, but that was left alone.
        graphs: one `GraphRecord` per captured graph.
        graph_breaks: one `GraphBreak` per place where Dynamo split the model.
    """

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data, in the layout that `to_json` writes."""
        return {
            "fusionpass": __version__,
            "torch": torch.__version__,
            "target": self.target,
            "graphs": [graph.to_dict() for graph in self.graphs],
            "graph_breaks": [graph_break.to_dict() for graph_break in self.graph_breaks],
            "rewrites": [rewrite.to_dict() for rewrite in self.rewrites],
            "misses": [miss.to_dict() for miss in self.misses],
        }

    def to_json(self, *, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def to_markdown(self) -> str:
        return render.markdown(self)

    def to_html(self) -> str:
        return render.html(self)

    def __str__(self) -> str:
        return render.table(self)
