"""Which values of a graph require gradients, if the tracer recorded this for the inputs only.

`torch.export` and `make_fx` record values without autograd. If the graph runs with gradients, every value computed from a
parameter that requires gradients requires them too. A stage that has no backward must then stay outside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves, tree_map

from fusionpass.graph.copying import child_graphs
from fusionpass.graph.identity import torch_name
from fusionpass.graph.tensors import attribute, value_of
from fusionpass.private import HigherOrderOperator


@contextmanager
def as_in_training(graph_module: GraphModule, example_inputs: Sequence[Any] = ()) -> Iterator[None]:
    """Inside the block, recorded values say `requires_grad` as they would in a run with gradients.

    The records are exchanged, not changed, because other graphs may share them. Nothing is done if gradients are off, or if
    the tracer's own records say it already.
    """
    if not torch.is_grad_enabled() or _says_itself(graph_module):
        yield
        return
    given: dict[int, tuple[Tensor, Tensor]] = {}
    _spread(graph_module, [_requires(value) for value in example_inputs], given)
    try:
        yield
    finally:
        _restore(graph_module, given)


def _says_itself(graph_module: GraphModule) -> bool:
    return any(_requires(value_of(node)) for node in graph_module.graph.nodes if node.op.startswith("call_"))


def _requires(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(value))


def _spread(graph_module: GraphModule, inputs: Sequence[bool], given: dict[int, tuple[Tensor, Tensor]]) -> None:
    """Exchange the records of all values computed from something that requires gradients, in child graphs too."""
    wanted: set[Node] = set()
    known, enabled = iter(inputs), True
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            found = next(known, False) or _requires(value_of(node))
        elif node.op == "get_attr":
            found = _requires(attribute(graph_module, str(node.target)))
        else:
            if node.target is torch._C._set_grad_enabled:
                enabled = bool(node.args[0])
            records = enabled and not _without_gradients(node)
            found = records and any(operand in wanted for operand in node.all_input_nodes)
        if not found:
            continue
        wanted.add(node)
        if node.op.startswith("call_"):
            for child in _children(graph_module, node):
                _spread(child, [True] * len(child.graph.nodes), given)
        for key in ("val", "example_value"):
            if key in node.meta:
                node.meta[key] = tree_map(lambda leaf: _requiring(leaf, given), node.meta[key])


def _without_gradients(node: Node) -> bool:
    if isinstance(node.target, HigherOrderOperator):
        return node.target.name() == "wrap_with_set_grad_enabled" and node.args[:1] == (False,)
    return torch_name(node) in ("detach", "detach_")


def _children(graph_module: GraphModule, node: Node) -> list[GraphModule]:
    """The graphs that a node calls: a module, or operands of a higher-order op."""
    holders = [node] if node.op == "call_module" else [each for each in node.all_input_nodes if each.op == "get_attr"]
    found = [attribute(graph_module, str(holder.target)) for holder in holders]
    return [child for child in found if isinstance(child, GraphModule)]


def _requiring(value: Any, given: dict[int, tuple[Tensor, Tensor]]) -> Any:
    """The same memory with the same layout, as a value that requires gradients."""
    if not isinstance(value, Tensor) or value.requires_grad or not value.is_floating_point():
        return value
    with torch.no_grad():
        if value.is_inference():  # recorded in inference mode: an alias of it cannot require gradients
            with getattr(value, "fake_mode", None) or nullcontext():
                new = torch.empty(0, dtype=value.dtype, device=value.device)
                new.set_(value.untyped_storage(), value.storage_offset(), value.shape, value.stride())
        else:
            new = value.detach()
    new.requires_grad_()
    given[id(new)] = new, value
    return new


def _restore(graph_module: GraphModule, given: dict[int, tuple[Tensor, Tensor]]) -> None:
    """Put the tracer's records back, also on new nodes that have taken them over."""
    for node in graph_module.graph.nodes:
        for key in ("val", "example_value"):
            if key in node.meta:
                node.meta[key] = tree_map(lambda leaf: given.get(id(leaf), (leaf, leaf))[1], node.meta[key])
    for child in child_graphs(graph_module).values():
        _restore(child, given)
