"""What stands between two nodes of a formula: views, casts, dropouts, and whether they matter."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from fusionpass.graph.naming import describe
from fusionpass.graph.nodes import is_cast, is_identity, is_view
from fusionpass.graph.refusal import Refusal
from fusionpass.graph.vocabulary import Vocabulary

# How many views and casts a near miss may lie behind; real models have at most 3 (chunk, getitem, cast).
REACH = 4


def walk_back(words: Vocabulary, value: object) -> tuple[Node | None, list[Node]]:
    """The first node on the way back from `value` that is no view, cast or dropout, and the nodes passed, nearest last."""
    between: list[Node] = []
    while isinstance(value, Node) and len(between) < REACH and value.args:
        if not (is_view(value) or is_cast(value) or words.operation(value) == "dropout"):
            break
        between.append(value)
        value = value.args[0]
    return (value if isinstance(value, Node) else None), between


def obstacle(
    words: Vocabulary, between: list[Node], source: Node, reader: Node, harmless: Callable[[Node], bool]
) -> Refusal | None:
    """Why the nodes between `source` and `reader` matter; None if each one hands on the same tensor or is `harmless`."""
    for node in between:
        if words.operation(node) == "dropout":
            if not words.drops_nothing(node):
                text = "{} reaches {} through {}, which drops elements or may do so later"
                return Refusal("dropout-between", text, source, reader, node)
        elif words.operation(node.args[0]) == "dropout":
            continue  # takes an element of the dropout's results: judged with the dropout
        elif not is_identity(node) and not harmless(node):
            kind = "cast-between" if is_cast(node) else "view-between"
            return Refusal(kind, "{} reaches {} through {}", source, reader, describe(node, words))
    return None
