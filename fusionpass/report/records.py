"""What the pass says about a graph: one record per rewritten site, one per near miss, one per graph, one per graph break.

All fields are plain data. So a record outlives its graph, can be pickled, and can be written as JSON without changes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


class _Record:
    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-ready data, one key per public field."""
        return {key: value for key, value in asdict(self).items() if not key.startswith("_")}


@dataclass(slots=True)
class Rewrite(_Record):
    """One site that now runs as one op."""

    rule: str  # the core formula: "gated_add"
    stages: list[str]  # what the op covers, in data-flow order: ["gate_projection", "gated_add"]
    nodes: list[str]  # names of the nodes that are gone from the graph, in graph order
    replacement: str  # name of the node that computes their value now
    module: str  # dotted path of the module that wrote the formula, "" when the tracer recorded none
    source: str  # "modeling_qwen3_next.py:866", "" when the tracer recorded none
    shape: list[int | str]  # of the result; a symbolic size is its expression as a string
    dtype: str  # "bfloat16"
    kernels_before: int  # how many kernels the unfused nodes are: see `against`
    kernels_after: int  # the same count now: the op, and old nodes that stay because of other readers
    bytes_before: int | None  # bytes that those kernels read and write; None if a size is not known
    bytes_after: int | None
    graph: int  # index into Report.graphs
    calls: int = 0  # how often that graph ran while collecting
    stopped: list[dict[str, str]] = field(default_factory=list)  # stages that did not join: stage, code, reason
    verified: bool | None = None  # with `verify`: whether the site could be run against its nodes; without it, None
    against: str = (
        "eager"  # whose kernels and bytes are "before": eager's, one kernel per arithmetic node, or "inductor"
    )


@dataclass(slots=True)
class Miss(_Record):
    """A sigmoid that feeds a product that feeds an add, and why it was left alone."""

    node: str  # name of the add
    rule: str  # the rule or stage that refused
    code: str  # stable, see `fusionpass rules`
    reason: str  # one sentence with the values
    module: str
    source: str
    graph: int
    calls: int = 0  # how often the graph that holds it ran while collecting


@dataclass(slots=True)
class GraphRecord(_Record):
    """One captured graph, child graphs (checkpointed bodies, branches of cond) included."""

    index: int
    nodes: int  # before rewriting, child graphs included
    rewrites: int
    misses: int
    calls: int = 0  # how often it ran while collecting
    compiled: bool = True  # False for a graph given to `rewrite`: its runs are not counted
    code_before: str | None = field(default=None, repr=False)  # kept only when asked for (`report --diff`)
    code_after: str | None = field(default=None, repr=False)


@dataclass(slots=True)
class GraphBreak(_Record):
    """A place where Dynamo ended one graph and began another."""

    reason: str
    source: str  # "modeling_qwen2_moe.py:293", "" when unknown


@dataclass
class Outcome:
    """What the pass did to one captured graph, child graphs included. The report sets the `graph` indices."""

    nodes: int = 0
    rewrites: list[Rewrite] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)  # outermost graph: a value's old node -> its new one, by name
    switched_off: bool = False  # PyTorch's tools kept the pass from running
    absent: tuple[str, ...] = ()  # what each tried rule says about a graph without a reading
