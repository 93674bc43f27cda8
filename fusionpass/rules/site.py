"""The values that go through the pass: an operand, and a site as it grows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch.fx import Node

from fusionpass.graph.refusal import Refusal
from fusionpass.graph.tensors import tensor_of
from fusionpass.rules.replacement import Op

Grown = TypeVar("Grown", bound="Site")


class Operand(NamedTuple):
    """What the op reads for one of its arguments, and where the graph reads it today.

    Attributes:
        value: a node, or the attribute path of a parameter for which the graph has no node (`gate.weight` of an nn.Linear).
        read: the first node that reads it today. The op may read it elsewhere only if nothing writes it in between.
        said: its name in sentences, if that is not the argument's name.
    """

    value: Node | str
    read: Node
    said: str = ""


@dataclass(kw_only=True, eq=False)
class Site:
    """One place in a graph that one op may take over. A rule finds it. Stages make larger sites of it by `grown`.

    A site never changes. If a step fails, the site from before the step is still there.

    Attributes:
        anchor: the node at which the reading began. It computes the core formula's result, and names the site.
        operands: argument of the op -> what it reads. A stage that computes an operand inside the op replaces it.
        parts: the nodes that the op replaces, in data-flow order. Those of the core, or of one stage, stand together.
        core: the operands of the core formula as they were found, also those that the op now computes itself.
        shapes: operand -> the shape that the formula sees, for operands that it sees through views.
        numbers: argument of the op -> its value, for those that are no tensors (top_k, eps, ...); and the option `numerics`.
        results: the nodes whose values the op computes, in the order of its results. An op may have more results.
        at: where the op goes. There all operands have been computed and may be read.
        overwrites: the operand whose memory gets the core's result, as in `a += b`.
        in_place: part -> the value whose memory gets the part's result.
        written_back: the operand that gets a copy of the first result, as in `residual += sum`.
        stages: names of the rule and the stages that joined, in data-flow order.
        stopped: stages that did not join, and why.
        op: what it becomes. The engine sets the rule's op, and a stage may set another.
    """

    anchor: Node
    operands: Mapping[str, Operand]
    parts: list[Node]
    core: Mapping[str, Operand] = field(default_factory=dict)
    shapes: Mapping[str, tuple] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)
    results: list[Node] = field(default_factory=list)
    at: Node = None  # type: ignore[assignment]
    overwrites: Node | None = None
    in_place: Mapping[Node, Node] = field(default_factory=dict)
    written_back: str | None = None
    stages: list[str] = field(default_factory=list)
    stopped: list[tuple[str, Refusal]] = field(default_factory=list)
    op: Op = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.core = self.core or self.operands
        self.results = self.results or [self.anchor]
        self.at = self.at or self.anchor

    def changed(self: Grown, **changes: Any) -> Grown:
        """The site with other values for some attributes. (`dataclasses.replace` takes several times as long.)"""
        new = object.__new__(type(self))
        new.__dict__ |= self.__dict__
        new.__dict__ |= changes
        return new

    @property
    def end(self) -> Node:
        """The node whose value is the op's first result."""
        return self.results[0]

    def node(self, name: str) -> Node | None:
        """The node that an argument of the op reads; None if it reads a path or nothing."""
        operand = self.operands.get(name)
        return operand.value if operand is not None and isinstance(operand.value, Node) else None

    def seen(self, name: str) -> tuple | torch.Size:
        """The shape that the core formula sees of its operand."""
        return self.shapes[name] if name in self.shapes else tensor_of(self.core[name].value).shape

    def grown(
        self: Grown,
        stage: str,
        *,
        before: Iterable[Node] = (),
        after: Iterable[Node] = (),
        operands: Mapping[str, Operand] | None = None,
        without: Iterable[str] = (),
        numbers: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> Grown:
        """The site with one more stage.

        Args:
            before, after: the stage's nodes, before or after the site's own nodes.
            operands, numbers: what the op reads for the stage, by argument.
            without: operands that the op now computes itself.
            changes: new values of other attributes.
        """
        before, after, gone = list(before), list(after), set(without)
        stages = [stage, *self.stages] if before else [*self.stages, stage]
        kept = {name: operand for name, operand in self.operands.items() if name not in gone}
        return self.changed(
            parts=[*before, *self.parts, *after],
            operands={**kept, **(operands or {})},
            numbers={**self.numbers, **(numbers or {})},
            stages=stages,
            **changes,
        )
