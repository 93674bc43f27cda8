"""The ops as plain functions, for graphs that Python runs node by node (inner "eager").

A call through the dispatcher and a Python Autograd kernel costs more CPU time than a small graph's launches save. The
function `direct` of an op skips both, if nothing listens on the way. If something does, it calls the op.
"""

from __future__ import annotations

from torch.fx import GraphModule

from fusionpass.graph.copying import child_graphs
from fusionpass.operators import OPS

FUNCTIONS = {op.overload: op.direct for op in OPS if op.direct is not None}


def call_directly(graph_module: GraphModule) -> None:
    """Let the graph and its child graphs call these functions in place of the ops."""
    for child in child_graphs(graph_module).values():
        call_directly(child)
    found = [node for node in graph_module.graph.nodes if node.target in FUNCTIONS]
    for node in found:
        node.target = FUNCTIONS[node.target]
    if found:
        graph_module.recompile()
