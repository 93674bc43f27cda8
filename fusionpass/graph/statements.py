"""In-place statements, `b.mul_(s)` and then `b`: while the pass looks, later readers of b read the statement's result.

That is the same tensor, so the graph means the same, and what is read after the write is told from what is read before.
Readers that are still there when the pass is done get the name back that they had.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch.fx import Graph, Node

from fusionpass.graph.vocabulary import Vocabulary


class Redirected(NamedTuple):
    """`reader` reads `result` for now, in place of the `written` tensor, which is the same one."""

    reader: Node
    written: Node
    result: Node


def redirect(graph: Graph, in_place: Sequence[Node], words: Vocabulary) -> list[Redirected]:
    """Have what reads a tensor after one of the `in_place` nodes wrote it, in graph order, read that node."""
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
    """Give the readers that the pass left alone their old names back."""
    alive = set(graph.nodes) if redirected else set()
    for reader, written, result in reversed(redirected):
        if {reader, written, result} <= alive and result in reader.all_input_nodes:
            reader.replace_input_with(result, written)
