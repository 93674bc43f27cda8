"""Recorded values for graphs whose tracer left none: from `example_inputs`, or from what `ShapeProp` recorded of the inputs.

The graph then runs once on fakes (`fusionpass.graph.propagate`). This module decides whether it must, and on which inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.shape_prop import TensorMetadata

from fusionpass.graph.propagate import called_graphs, lacks_values, propagate
from fusionpass.graph.tensors import value_of
from fusionpass.private import FakeTensorMode

_NONE_RECORDED = (
    "the graph has no recorded shapes, as after torch.fx.symbolic_trace: call rewrite(graph, example_inputs) "
    "with one value per input"
)


def ensure_shapes(graph_module: GraphModule, example_inputs: Sequence[Any] | None) -> None:
    """Make sure that the nodes of the graph, and of the graphs that it calls, have recorded values.

    Raises:
        ValueError: `example_inputs` do not fit the graph, or there are none and no value is recorded.
    """
    inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    if example_inputs is not None:
        required = sum(1 for node in inputs if not node.args)
        if not required <= len(example_inputs) <= len(inputs):
            names = ", ".join(node.name for node in inputs)
            raise ValueError(f"example_inputs has {len(example_inputs)} values, the graph takes {len(inputs)}: {names}")
    graphs = [graph_module, *_within(graph_module)]
    lacking = [graph for graph in graphs if lacks_values(graph)]
    if not lacking:
        return
    if example_inputs is None:
        example_inputs = _recorded_inputs(graph_module, inputs)
    if example_inputs is not None:
        propagate(graph_module, example_inputs)
    elif len(lacking) == len(graphs):
        raise ValueError(_NONE_RECORDED)


def _within(graph_module: GraphModule) -> Iterator[GraphModule]:
    for child in called_graphs(graph_module):
        yield child
        yield from _within(child)


def _recorded_inputs(graph_module: GraphModule, inputs: Sequence[Node]) -> list[Any] | None:
    """The graph's inputs as fakes, made from their records; None if nothing was recorded."""
    if any("tensor_meta" in node.meta and value_of(node) is None for node in graph_module.graph.nodes):
        return _of_shape_prop(graph_module, inputs)
    values = [value_of(node) for node in inputs]
    return None if not values or any(value is None for value in values) else values


def _of_shape_prop(graph_module: GraphModule, inputs: Sequence[Node]) -> list[Any]:
    """`ShapeProp` records a shape, dtype and strides, but no device and no memory.

    So the graph runs on fakes made from these. This run shows which value is a view of which. The device is that of the
    parameters. Each input is taken to have memory of its own, like the tracer's placeholders.
    """
    sizes = chain.from_iterable(
        (*m.shape, *m.stride) for node in inputs for m in _metadata_in(node.meta.get("tensor_meta"))
    )
    symbols = [size for size in sizes if isinstance(size, torch.SymInt)]
    mode = FakeTensorMode(shape_env=symbols[0].node.shape_env if symbols else None, allow_non_fake_inputs=True)
    devices = {tensor.device for tensor in chain(graph_module.parameters(), graph_module.buffers())}
    device = devices.pop() if len(devices) == 1 else torch.get_default_device()

    def fake(recorded: Any) -> Any:
        if isinstance(recorded, TensorMetadata):
            with mode:
                value = torch.empty_strided(recorded.shape, recorded.stride, dtype=recorded.dtype, device=device)
            return value.requires_grad_(recorded.requires_grad)
        if isinstance(recorded, dict):
            return {key: fake(value) for key, value in recorded.items()}
        return type(recorded)(map(fake, recorded)) if isinstance(recorded, list | tuple) else recorded

    found = []
    for node in inputs:
        metadata = _metadata_in(node.meta.get("tensor_meta"))
        if any(each.is_quantized or len(each.shape) != len(each.stride) for each in metadata):
            raise ValueError(f"ShapeProp recorded a quantized or sparse tensor for {node.name}: {_GIVE_INPUTS}")
        if not metadata and not node.args and node.users:
            raise ValueError(f"ShapeProp recorded no value of {node.name}, which is no tensor: {_GIVE_INPUTS}")
        found.append(fake(node.meta["tensor_meta"]) if metadata else (node.args[0] if node.args else None))
    return found


_GIVE_INPUTS = "pass example_inputs, with one value per input of the graph"


def _metadata_in(recorded: Any) -> list[TensorMetadata]:
    if isinstance(recorded, TensorMetadata):
        return [recorded]
    if isinstance(recorded, dict):
        recorded = tuple(recorded.values())
    return [each for item in recorded for each in _metadata_in(item)] if isinstance(recorded, list | tuple) else []
