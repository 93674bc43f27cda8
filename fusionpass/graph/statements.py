"""In-place statements, `b.mul_(s)` and then `b`: during the pass, later readers of b read the statement's result.

This is the same tensor, so the graph means the same. It shows which reads come after the write and which before. When
the pass is done, the readers that are left read `b` again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch.fx import Graph, Node

from fusionpass.graph.vocabulary import Vocabulary


class Redirected(NamedTuple):
    """For now `reader` reads `result` instead of `written`. Both are the same tensor."""

    reader: Node
    written: Node
    result: Node


def redirect(graph: Graph, in_place: Sequence[Node], words: Vocabulary) -> list[Redirected]:
    """If a node reads a tensor after one of the `in_place` nodes wrote it, let it read the `in_place` node instead."""
    found: list[Redirected] = []
    position = {node: index for index, node in enumerate(graph.nodes)} if in_place else {}
    for node in in_place:
        meaning = words.meaning(node)
        written = meaning.operands[0] if meaning is not None and meaning.operands else None
        if not isinstance(written, Node):
            continue
        for reader in list(written.users):
            if position[reader] > position[node]:
                reader.replace_input_with(written, node)
                found.append(Redirected(reader, written, node))
    return found


def restore(graph: Graph, redirected: Sequence[Redirected]) -> None:
    """Let the readers that the pass left alone read what they read before."""
    alive = set(graph.nodes) if redirected else set()
    for reader, written, result in reversed(redirected):
        if {reader, written, result} <= alive and result in reader.all_input_nodes:
            reader.replace_input_with(result, written)
