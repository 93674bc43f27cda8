"""A copy of a GraphModule whose graph may be edited. Everything else is kept, and tensors and submodules are shared.

The copy has all that belongs to the module itself: hooks, unused buffers, attributes, its class, whether it trains.
Parameters, buffers and leaf modules are the same objects in both. The copy has its own dicts for them, so that a change
of one module does not show in the other.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from fusionpass.private import _WrappedHook


def editable(graph_module: GraphModule, memo: dict[int, torch.nn.Module] | None = None) -> GraphModule:
    """The copy. Child graphs are copied too; if several calls share one, it is copied once.

    Raises:
        ValueError: `graph_module.forward` was assigned on the instance, so a call does not run the graph.
    """
    if replaces_forward(graph_module):
        raise ValueError(
            "the graph module's forward was replaced on the instance, so its graph is not what a call runs: "
            "give rewrite the graph module as it was before, and wrap the result"
        )
    memo = {} if memo is None else memo
    if id(graph_module) in memo:
        return memo[id(graph_module)]
    new = _shallow(graph_module, memo)
    new.graph = _copied(graph_module.graph)  # compiles the forward
    for path, child in child_graphs(graph_module).items():
        parent, _, leaf = path.rpartition(".")
        setattr(_own_container(new, parent, memo), leaf, editable(child, memo))
    return new


def replaces_forward(graph_module: GraphModule) -> bool:
    """Whether somebody assigned `forward` on the instance, as wrappers of modules do. A call then does not run the graph."""
    return "forward" in vars(graph_module)


def child_graphs(graph_module: GraphModule) -> dict[str, GraphModule]:
    """Child graphs by path, in the order of their first use: checkpointed bodies, branches of cond, nested regions."""
    found = {}
    for node in graph_module.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            value = graph_module
            for name in str(node.target).split("."):
                value = getattr(value, name, None)
            if isinstance(value, GraphModule) and not replaces_forward(value):
                found[str(node.target)] = value
    return found


def _shallow(module: torch.nn.Module, memo: dict[int, torch.nn.Module]) -> Any:
    """A module of the same class with the same attributes, in dicts and lists of its own."""
    new = type(module).__new__(type(module))
    memo[id(module)] = new
    for name, value in vars(module).items():
        if name in ("_graph", "_compiled_call_impl"):  # the copy gets its own graph; compiled code calls the old module
            continue
        if (name.startswith("_") or name == "meta") and isinstance(value, dict | list | set):
            value = copy.copy(value)
            if isinstance(value, dict) and name.endswith("hooks"):
                value.update({key: _rebound(hook, module, new) for key, hook in value.items()})
        new.__dict__[name] = _rebound(value, module, new)
    if isinstance(module, GraphModule):  # every graph module has a class of its own, made by __new__
        type(new).__name__ = type(module).__name__
    for name, child in module._modules.items():
        if type(child) is torch.nn.Module:  # only a container on a path, no leaf module
            new._modules[name] = _copy_of(child, memo)
    return new


def _rebound(value: Any, old: torch.nn.Module, new: torch.nn.Module) -> Any:
    """A method or hook that was bound to the old module, bound to the new one; anything else as it is."""
    if isinstance(value, MethodType) and value.__self__ is old:
        return MethodType(value.__func__, new)
    if isinstance(value, _WrappedHook) and value.with_module and value.module() is old:
        return _WrappedHook(value.hook, new)
    return value


def _own_container(root: torch.nn.Module, path: str, memo: dict[int, torch.nn.Module]) -> torch.nn.Module:
    """The submodule at `path` of the copy. Each module on the path is copied too, so that a child can be exchanged."""
    own = {id(module) for module in memo.values()}
    for name in filter(None, path.split(".")):
        inner = getattr(root, name)
        if id(inner) not in own:
            inner = _copy_of(inner, memo)
            setattr(root, name, inner)
        root = inner
    return root


def _copy_of(module: torch.nn.Module, memo: dict[int, torch.nn.Module]) -> torch.nn.Module:
    if id(module) in memo:
        return memo[id(module)]
    if isinstance(module, GraphModule) and not replaces_forward(module):
        return editable(module, memo)
    new = _shallow(module, memo)
    if isinstance(module, GraphModule):
        new.graph = _copied(module.graph)
    return new


def _copied(graph: Graph) -> Graph:
    """The graph with every node's name. A plain copy renames nodes that have the name of a builtin, such as `input`, and an
    exported program's signature knows its inputs by name. Also with what Dynamo puts on its inputs and AOTAutograd needs."""
    new = copy.deepcopy(graph)
    for old_node, new_node in zip(graph.nodes, new.nodes, strict=True):
        new_node.name = old_node.name
        for name, value in vars(old_node).items():
            if name not in vars(new_node):
                setattr(new_node, name, value)
    return new
