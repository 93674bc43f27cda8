"""One node comes in, the nodes that it replaces go out. Only this module edits a graph."""

from __future__ import annotations

import operator
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch.fx import Graph, Node

from fusionpass.graph.effects import Effects
from fusionpass.graph.nodes import is_reshape, readers
from fusionpass.graph.provenance import inherit
from fusionpass.graph.tensors import known_contiguous, known_equal, same_sizes, tensor_of
from fusionpass.rules.calling import call_of
from fusionpass.rules.same_results import as_fake, fake_mode_for, reshaped
from fusionpass.rules.site import Operand, Site


class Inserted(NamedTuple):
    """The op at its place. Nothing reads its results yet."""

    op: Node
    results: tuple[Node, ...]  # one for each result of the site; the op itself if it has one result
    views: tuple[Node, ...] = ()  # views of operands, in the shapes that the formula sees


class Replacement(NamedTuple):
    """The node of the op, the names of the nodes that are gone, and the new names of the values that remain."""

    node: Node
    gone: list[str]
    renamed: dict[str, str]


def insert(graph: Graph, site: Site) -> Inserted:
    """Compute the site's results by one op, at the place of the last of its sums."""
    op = site.op
    with graph.inserting_before(site.at):
        views = {name: view for name in site.shapes if (view := _viewed(graph, site, name)) is not None}
        args, kwargs = call_of(site, lambda name, operand: views.get(name) or _read(graph, operand))
        new = graph.create_node("call_function", op.target, args, kwargs, name=op.name)
    made = tuple(views.values())
    if not op.several:
        new.meta = inherit(site.end, str(new.target))
        _own_memory(new, site)
        return Inserted(new, (new,), made)
    results = []
    for index, (old, said) in enumerate(zip(site.results, op.results, strict=False)):
        # The first result stands beside the op. Any other stands where the old one stood, because `torch.export.unflatten`
        # expects the nodes of a module to stand together.
        with graph.inserting_before(site.at if index == 0 else old):
            name = f"{new.name}_{said.partition(' ')[0]}"
            results.append(graph.create_node("call_function", operator.getitem, (new, index), name=name))
        results[-1].meta = inherit(old, "getitem")
    _own_memory(results[0], site)
    _describe(new, results, op.results)
    return Inserted(new, tuple(results), made)


def _read(graph: Graph, operand: Operand) -> Node:
    return graph.get_attr(operand.value) if isinstance(operand.value, str) else operand.value


def _viewed(graph: Graph, site: Site, name: str) -> Node | None:
    """The operand in the shape that the formula sees, after views that the op does not need; None if that is its own
    shape."""
    node, shape = site.node(name), site.shapes[name]
    if node is None or same_sizes(tensor_of(node).shape, shape):
        return None
    value = tensor_of(node)
    sizes = [size if isinstance(size, int) else _size_node(graph, site, size) for size in shape]
    target = torch.ops.aten.view.default if known_contiguous(value) else torch.ops.aten.reshape.default
    new = graph.create_node("call_function", target, (node, sizes), name=f"{node.name}_view")
    new.meta = inherit(node, "view") | {_value_key(node): reshaped(value, shape)}
    return new


def _size_node(graph: Graph, site: Site, size: torch.SymInt) -> Node:
    """A node for a size that is not known until the graph runs. It is a size of an operand; the rule has checked this."""
    nodes = [operand.value for operand in site.core.values() if isinstance(operand.value, Node)]
    sizes = ((node, dim, other) for node in nodes for dim, other in enumerate(tensor_of(node).shape))
    node, dim, found = next((node, dim, other) for node, dim, other in sizes if known_equal(other, size))
    new = graph.create_node("call_function", torch.ops.aten.sym_size.int, (node, dim))
    new.meta[_value_key(node)] = found
    return new


def _value_key(node: Node) -> str:
    return "val" if "val" in node.meta else "example_value"


def take_over(graph: Graph, site: Site, new: Inserted, effects: Effects) -> Replacement:
    """Let the readers of the site's results read the op's results.

    Only the site's own nodes and the views made for them are erased, each only if nothing reads it any more. No other
    node is touched.
    """
    results = list(new.results)
    if site.written_back is not None:
        results[0] = _written_back(graph, site, results[0])
    renamed = {old.name: result.name for old, result in zip(site.results, results, strict=True)}
    for old, result in zip(site.results[1:], results[1:], strict=True):
        _stand_in(result, old, effects)
    for node in (new.op, new.results[0], *new.views):
        effects.position.setdefault(node, effects.position[site.at])
    _stand_in(results[0], site.end, effects)
    # Nodes that were computed from the old sum, such as a norm, now read the new one. They are erased first.
    return Replacement(new.op, _erase(graph, site), renamed)


def _written_back(graph: Graph, site: Site, total: Node) -> Node:
    """`residual += sum`: others see the residual's memory, so the op's result is copied into it."""
    written = site.operands[site.written_back].value
    with graph.inserting_before(site.at):
        new = graph.create_node("call_function", torch.ops.aten.copy_.default, (written, total))
    new.meta = inherit(site.end, "copy_")
    return new


def _describe(new: Node, results: list[Node], names: tuple[str, ...]) -> None:
    """Record what a tracer would have recorded for an op with several results."""
    first = results[0]
    key = _value_key(first)
    new.meta = {k: v for k, v in first.meta.items() if k not in ("tensor_meta", "val", "example_value")}
    values = [result.meta[_value_key(result)] for result in results]
    empty = _empty_like(values[0])
    new.meta[key] = (*values, *(empty for _ in names[len(values) :]))


def _stand_in(new: Node, old: Node, effects: Effects) -> None:
    old.replace_all_uses_with(new)
    effects.adopt(new, old)


def _erase(graph: Graph, site: Site) -> list[str]:
    """Erase the site's nodes that nothing reads any more, and return their names."""
    gone: dict[Node, str] = {}

    def erase(node: Node) -> None:
        graph.erase_node(node)
        gone[node] = node.name

    for part in reversed(site.parts):
        if part in gone or readers(part):
            continue
        operands = part.all_input_nodes
        for node in (*part.users, part):  # first the asserts about the part, then the part
            erase(node)
        for operand in operands:  # views that only the part read, such as the weights' unsqueeze
            while is_reshape(operand) and not operand.users:
                before = operand.args[0]
                erase(operand)
                operand = before
    return list(gone.values())[::-1]


def _empty_like(value: torch.Tensor) -> torch.Tensor:
    with getattr(value, "fake_mode", None) or nullcontext():
        return value.new_empty(0)


def _own_memory(new: Node, site: Site) -> None:
    """The recorded value of `a += ...` is a itself, but the op's result has memory of its own."""
    if site.overwrites is None and site.written_back is None:
        return
    value, key = tensor_of(site.end), _value_key(new)
    new.meta[key] = as_fake(value, getattr(value, "fake_mode", None) or fake_mode_for([value]))
