"""The ops as plain functions, for graphs that Python runs node by node (inner "eager").

A call through the dispatcher and a Python Autograd kernel costs more CPU time than a small graph's launches save. These
do without where nothing would listen on the way, and are the ops where something does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from fusionpass import derivatives, library
from fusionpass.copying import child_graphs
from fusionpass.derivatives import plain, recorded
from fusionpass.implementations import ALL, COMBINE_TENSORS, combine_arguments, kernel_dtypes, kernels, kernels_take


def gated_add(
    a: Tensor, gate: Tensor, b: Tensor, *, numerics: str = "fp32", dtype: torch.dtype | None = None
) -> Tensor:
    """`torch.ops.fusionpass.gated_add`."""
    if plain(a, gate, b) and (kernel_dtypes(a) is ALL or kernels_take(a, gate, b, dtype=dtype)):
        if recorded(a, gate, b):
            return derivatives.gated_add(None, a, gate, b, numerics=numerics, dtype=dtype)
        return kernels().gated_add.gated_add(a, gate, b, numerics, dtype)
    return library.gated_add(a, gate, b, numerics=numerics, dtype=dtype)


def gate_projected_add(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *, dtype: torch.dtype | None = None
) -> Tensor:
    """`torch.ops.fusionpass.gate_projected_add`."""
    if plain(x, weight, bias, a, b) and (kernel_dtypes(a) is ALL or kernels_take(x, weight, bias, a, b, dtype=dtype)):
        if recorded(x, weight, bias, a, b):
            return derivatives.gate_projected_add(None, x, weight, bias, a, b, dtype=dtype)
        return kernels().gate_projected_add.gate_projected_add(x, weight, bias, a, b, dtype)
    return library.gate_projected_add(x, weight, bias, a, b, dtype=dtype)


def moe_combine(a: Tensor, b: Tensor, **options) -> tuple[Tensor, Tensor]:
    """`torch.ops.fusionpass.moe_combine`."""
    arguments = combine_arguments(a, b, **options)
    tensors = arguments[:COMBINE_TENSORS]
    taken = plain(*tensors) and (kernel_dtypes(a) is ALL or kernels_take(*tensors, dtype=arguments[-1]))
    if taken and not recorded(*tensors):
        return kernels().moe_combine.moe_combine(*arguments)
    return library.moe_combine(a, b, **options)


_FUNCTIONS = {
    library.gated_add: gated_add,
    library.gate_projected_add: gate_projected_add,
    library.moe_combine: moe_combine,
}


def call_directly(graph_module: GraphModule) -> None:
    """Have the graph and its child graphs call these functions in place of the ops."""
    for child in child_graphs(graph_module).values():
        call_directly(child)
    found = [node for node in graph_module.graph.nodes if node.target in _FUNCTIONS]
    for node in found:
        node.target = _FUNCTIONS[node.target]
    if found:
        graph_module.recompile()
