"""One node in, its predecessors out: the only place that edits a graph."""

from __future__ import annotations

import operator
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch.fx import Graph, Node

from fusionpass.effects import Effects
from fusionpass.match import Site
from fusionpass.nodes import is_reshape, readers
from fusionpass.options import Options
from fusionpass.provenance import inherit
from fusionpass.tensors import known_contiguous, known_equal, same_sizes, tensor_of, under_autocast
from fusionpass.verify import as_fake, fake_mode_for, reshaped


class Inserted(NamedTuple):
    """The op in front of the site's last sum; nothing reads its results yet."""

    op: Node
    total: Node  # the op itself where it has one result
    normed: Node | None
    views: tuple[Node, ...] = ()  # of the gate and b, in the shapes in which the formula sees them


class Replacement(NamedTuple):
    """The node of the op, the names of the nodes that are gone, and the new names of the values that live on."""

    node: Node
    gone: list[str]
    renamed: dict[str, str]


def insert(graph: Graph, site: Site, options: Options) -> Inserted:
    """Compute the site's results by one op, right where the last of its sums stands."""
    with graph.inserting_before(site.at):
        gate, made = site.gate, []
        if site.projection is None:
            gate = _viewed(graph, site, site.gate, site.gate_shape, made)
        b = _viewed(graph, site, site.b, site.b_shape, made)
        if not site.combined:
            new = _call(graph, site, gate, b, options)
            new.meta = inherit(site.end, str(new.target))
            if site.overwrites is not None:
                _own_value(new, tensor_of(site.end))
            return Inserted(new, new, None, tuple(made))
        op = _combine_call(graph, site, gate, b)
        total = graph.create_node("call_function", operator.getitem, (op, 0), name=f"{op.name}_sum")
        normed = None
    if site.combined and site.norm is not None:
        # Where the old one stood: `torch.export.unflatten` tells a module's nodes by their standing together.
        with graph.inserting_before(site.norm.result):
            normed = graph.create_node("call_function", operator.getitem, (op, 1), name=f"{op.name}_normed")
    _describe(site, op, total, normed)
    return Inserted(op, total, normed, tuple(made))


def _viewed(graph: Graph, site: Site, node: Node, shape: tuple | None, made: list[Node]) -> Node:
    """The operand in the shape in which the formula sees it, behind the views that the op does without."""
    if shape is None or same_sizes(tensor_of(node).shape, shape):
        return node
    value = tensor_of(node)
    sizes = [size if isinstance(size, int) else _size_node(graph, site.a, size) for size in shape]
    target = torch.ops.aten.view.default if known_contiguous(value) else torch.ops.aten.reshape.default
    new = graph.create_node("call_function", target, (node, sizes), name=f"{node.name}_view")
    new.meta = inherit(node, "view") | {_value_key(node): reshaped(value, shape)}
    made.append(new)
    return new


def _size_node(graph: Graph, a: Node, size: torch.SymInt) -> Node:
    """A node for a size that is open until the graph runs: one of a's, which `pattern` has made sure of."""
    dim = next(index for index, other in enumerate(tensor_of(a).shape) if known_equal(other, size))
    new = graph.create_node("call_function", torch.ops.aten.sym_size.int, (a, dim))
    new.meta[_value_key(a)] = tensor_of(a).shape[dim]
    return new


def _value_key(node: Node) -> str:
    return "val" if "val" in node.meta else "example_value"


def take_over(graph: Graph, site: Site, new: Inserted, effects: Effects) -> Replacement:
    """Have readers of the site's results read the op's.

    Only the site's own nodes and the views made for them are erased, each only when nothing reads it any more; no other
    node is touched.
    """
    total = new.total
    if site.residual_written:
        total = _written_back(graph, site, new.total)
    renamed = {site.end.name: total.name}
    if new.normed is not None:
        renamed[site.norm.result.name] = new.normed.name
        _stand_in(new.normed, site.norm.result, effects)
    for node in (new.op, new.total, *new.views):
        effects.position.setdefault(node, effects.position[site.at])
    _stand_in(total, site.end, effects)
    # The norm read the old sum, whose readers are now the new one's: its nodes go first.
    return Replacement(new.op, _erase(graph, site), renamed)


def _written_back(graph: Graph, site: Site, total: Node) -> Node:
    """`residual += sum`: the residual's memory, which others see, gets what the op computed."""
    with graph.inserting_before(site.at):
        new = graph.create_node("call_function", torch.ops.aten.copy_.default, (site.residual, total))
    new.meta = inherit(site.end, "copy_")
    return new


def _describe(site: Site, op: Node, total: Node, normed: Node | None) -> None:
    """What a tracer would have recorded of the op with two results."""
    end = site.end
    key = _value_key(end)
    total.meta = inherit(end, "getitem")
    if site.residual_written or site.overwrites is not None:
        _own_value(total, tensor_of(end))
    op.meta = {k: v for k, v in total.meta.items() if k not in ("tensor_meta", "val", "example_value")}
    values = [total.meta[key], _empty_like(total.meta[key])]
    if normed is not None:
        normed.meta = inherit(site.norm.result, "getitem")
        values[1] = normed.meta[key]
    op.meta[key] = tuple(values)


def _stand_in(new: Node, old: Node, effects: Effects) -> None:
    old.replace_all_uses_with(new)
    effects.adopt(new, old)


def _erase(graph: Graph, site: Site) -> list[str]:
    """Erase those of the site's nodes that nothing reads any more, and say which."""
    gone: dict[Node, str] = {}

    def erase(node: Node) -> None:
        graph.erase_node(node)
        gone[node] = node.name

    for part in reversed(site.parts):
        if part in gone or readers(part):
            continue
        operands = part.all_input_nodes
        for node in (*part.users, part):  # asserts on what is gone, then itself
            erase(node)
        for operand in operands:  # views that only the part read, such as the weights' unsqueeze
            while is_reshape(operand) and not operand.users:
                before = operand.args[0]
                erase(operand)
                operand = before
    return list(gone.values())[::-1]


def _combine_call(graph: Graph, site: Site, gate: Node, b: Node) -> Node:
    def operand(given: Node | str | None) -> Node | None:
        return graph.get_attr(given) if isinstance(given, str) else given

    routed, projected, norm = site.finalize, site.projection, site.norm
    options: dict[str, object] = {}
    if projected is None:
        options["gate"] = gate
    else:
        options |= {"x": projected.x, "gate_weight": operand(projected.weight), "gate_bias": operand(projected.bias)}
    if routed is not None:
        options |= {"topk_weights": routed.weights, "inverse": routed.inverse, "top_k": routed.top_k}
        options |= {"permuted": routed.permuted, "masked": routed.masked}
    options["residual"] = site.residual
    if norm is not None:
        options |= {"norm_weight": operand(norm.weight), "eps": norm.eps, "offset": norm.offset}
    options["dtype"] = _stored(site)
    options = {name: value for name, value in options.items() if value is not None and value is not False}
    args = (site.a if routed is None else routed.y, b)
    return graph.create_node(
        "call_function", torch.ops.fusionpass.moe_combine.default, args, options, name="moe_combine"
    )


def _empty_like(value: torch.Tensor) -> torch.Tensor:
    with getattr(value, "fake_mode", None) or nullcontext():
        return value.new_empty(0)


def _call(graph: Graph, site: Site, gate: Node, b: Node, options: Options) -> Node:
    ops = torch.ops.fusionpass
    found, dtype = site.projection, _stored(site)
    kwargs: dict[str, object] = {} if dtype is None else {"dtype": dtype}
    if found is None:
        kwargs |= {} if options.numerics == "fp32" else {"numerics": options.numerics}
        args = (site.a, gate, b)
        return graph.create_node("call_function", ops.gated_add.default, args, kwargs, name="gated_add")
    weight, bias = (graph.get_attr(p) if isinstance(p, str) else p for p in (found.weight, found.bias))
    args = (found.x, weight, bias, site.a, b)
    return graph.create_node("call_function", ops.gate_projected_add.default, args, kwargs, name="gate_projected_add")


def _stored(site: Site) -> torch.dtype | None:
    """The dtype to store, where the operands do not say it: they differ, or autocast has a say in what they become."""
    routed = site.finalize
    read = [site.gate, site.b, site.residual, site.a if routed is None else routed.y]
    dtypes = {tensor_of(node).dtype for node in (site.end, *read) if node is not None}
    total = tensor_of(site.end)
    regions = site.add.graph.find_nodes(op="call_function", target=torch.amp.autocast_mode._enter_autocast, sort=False)
    if len(dtypes) > 1 or (site.combined and (regions or under_autocast(total.device))):
        return total.dtype
    return None


def _own_value(new: Node, old_value: torch.Tensor) -> None:
    """The recorded value of `a += ...` is a itself; the op's result is memory of its own."""
    key = _value_key(new)
    new.meta[key] = as_fake(old_value, getattr(old_value, "fake_mode", None) or fake_mode_for([old_value]))
