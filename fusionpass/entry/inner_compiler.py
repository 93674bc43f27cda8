"""The inner compiler, which gets the rewritten graph, and the settings of Inductor for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch.fx import GraphModule, Node

from fusionpass.entry.cache_key import in_cache_keys
from fusionpass.graph.copying import child_graphs
from fusionpass.graph.identity import torch_name
from fusionpass.inductor_settings import of_mode
from fusionpass.options import Options
from fusionpass.rules import own

Compiled = Callable[..., Any]
_OF_SEQUENCES = frozenset(("conv1d", "conv_transpose1d"))  # the convolutions that are not of images


def compiler_of(options: Options) -> Callable[[GraphModule, Sequence[Any]], Compiled]:
    """The compiler that the option `inner` names: the callable itself, or the backend registered under the name."""
    if callable(options.inner):
        return options.inner
    from fusionpass.private import lookup_backend

    return lookup_backend(options.inner)


def inductor_settings(options: Options) -> dict[str, Any]:
    """What `mode` and the option `inductor` change in Inductor's configuration for this one compilation."""
    if options.inner != "inductor":
        return {}
    return {**of_mode(options.mode), **options.inductor}


def tunes(settings: Mapping[str, Any]) -> bool:
    """Whether Inductor tunes its kernels by coordinate descent. Then it also makes the gate's projection one kernel."""
    from fusionpass.private import config

    return bool(settings.get("coordinate_descent_tuning", config.coordinate_descent_tuning))


def compile_inner(
    graph_module: GraphModule, example_inputs: Sequence[Any], options: Options, rewritten: bool
) -> Compiled:
    """The graph, compiled by the inner compiler.

    rewritten: whether the pass changed the graph. If not, Inductor's settings are not touched.
    """
    compiler = compiler_of(options)
    settings = inductor_settings(options)
    if options.inner == "inductor" and rewritten and "layout_optimization" not in settings:
        settings |= layout_kept(graph_module)
    with in_cache_keys(own(options.rules)) if rewritten else nullcontext():
        if not settings:
            return compiler(graph_module, example_inputs)
        return compiler(graph_module, example_inputs, config_patches=settings)


def layout_kept(graph_module: GraphModule) -> dict[str, bool]:
    """A setting that keeps Inductor from laying 4-D tensors out for convolutions, if no convolution is of images.

    Inductor does so in a graph with fewer than 300 nodes per convolution (`GraphLowering.decide_layout_opt`). It counts
    convolutions of any kind, though it then converts the operands of 2-D ones only. A linear-attention layer has a 1-D
    convolution and a few hundred nodes, and every rewritten site takes a dozen nodes away. Where this went below the
    limit, the layer's recurrent state [B, heads, K, V] was laid out with its heads innermost, and its one kernel became
    three. On an H100 at batch 1, 10 layers of Qwen3-Next took 2.03 ms per step instead of 1.93, 24 us more per layer.
    """
    kinds = {name for name in map(torch_name, _calls(graph_module)) if "conv" in name}
    return {"layout_optimization": False} if kinds and kinds <= _OF_SEQUENCES else {}


def _calls(graph_module: GraphModule) -> Iterator[Node]:
    yield from (node for node in graph_module.graph.nodes if node.op in ("call_function", "call_method"))
    for child in child_graphs(graph_module).values():
        yield from _calls(child)
