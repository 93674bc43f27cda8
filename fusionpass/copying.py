"""A copy of a GraphModule whose graph may be edited, sharing every parameter, buffer and leaf module with the original."""

from __future__ import annotations

import copy

from torch.fx import Graph, GraphModule

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def editable(graph_module: GraphModule, memo: dict[int, GraphModule] | None = None) -> GraphModule:
    """The copy; child graphs are copied too, a child that several calls share once."""
    memo = {} if memo is None else memo
    if id(graph_module) in memo:
        return memo[id(graph_module)]
    new = GraphModule(graph_module, _copied(graph_module.graph), type(graph_module).__name__)
    memo[id(graph_module)] = new
    new.meta = dict(getattr(graph_module, "meta", {}))
    new.training = graph_module.training  # not .train(), which would reach the shared submodules
    for name in _HOOKS:
        getattr(new, name).update(getattr(graph_module, name))
    for path, child in child_graphs(new).items():
        parent, _, leaf = path.rpartition(".")
        setattr(new.get_submodule(parent), leaf, editable(child, memo))
    return new


def _copied(graph: Graph) -> Graph:
    """The graph with every node's name: copying renames those that are called as a builtin is, such as `input`, by which
    name an exported program's signature knows it."""
    new = copy.deepcopy(graph)
    for old_node, new_node in zip(graph.nodes, new.nodes, strict=True):
        new_node.name = old_node.name
    return new


def child_graphs(graph_module: GraphModule) -> dict[str, GraphModule]:
    """Child graphs by path, in the order of their first use: checkpointed bodies, branches of cond, nested regions."""
    found = {}
    for node in graph_module.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            value = graph_module
            for name in str(node.target).split("."):
                value = getattr(value, name, None)
            if isinstance(value, GraphModule):
                found[str(node.target)] = value
    return found
