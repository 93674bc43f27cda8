"""One node in, its predecessors out: the only place that edits a graph."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from fusionpass.effects import Effects
from fusionpass.match import Site
from fusionpass.options import Options
from fusionpass.provenance import inherit
from fusionpass.tensors import tensor_of


def replace(graph: Graph, site: Site, effects: Effects, options: Options) -> tuple[Node, list[str]]:
    """Compute the site's sum by one op, right where the add stood; returns the new node and the names of those gone.

    Only the site's own nodes are erased, each only when nothing reads it any more; no other node is touched.
    """
    add = site.add
    with graph.inserting_before(add):
        new = _call(graph, site, options)
    new.meta = inherit(add, str(new.target))
    if site.writes_a:
        _own_value(new, tensor_of(add))
    add.replace_all_uses_with(new)
    effects.adopt(new, add)
    gone = []
    for part in reversed(site.parts):
        if not part.users:
            graph.erase_node(part)
            gone.append(part.name)
    return new, gone[::-1]


def _call(graph: Graph, site: Site, options: Options) -> Node:
    ops = torch.ops.fusionpass
    found = site.projection
    if found is None:
        kwargs = {} if options.numerics == "fp32" else {"numerics": options.numerics}
        args = (site.a, site.gate, site.b)
        return graph.create_node("call_function", ops.gated_add.default, args, kwargs, name="gated_add")
    weight, bias = (graph.get_attr(p) if isinstance(p, str) else p for p in (found.weight, found.bias))
    args = (found.x, weight, bias, site.a, site.b)
    return graph.create_node("call_function", ops.gate_projected_add.default, args, name="gate_projected_add")


def _own_value(new: Node, old_value: torch.Tensor) -> None:
    """The recorded value of `a += ...` is a itself; the op's result is memory of its own."""
    key = "val" if "val" in new.meta else "example_value"
    mode = getattr(old_value, "fake_mode", None)
    if mode is not None:
        with mode, torch.no_grad():
            new.meta[key] = torch.empty_strided(
                old_value.shape, old_value.stride(), dtype=old_value.dtype, device=old_value.device
            )
