"""Small programs around the formula, the ways to capture them, and what is held of every rewritten graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import fusionpass
from fusionpass.report import Report

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Two runs of a model that differ in the rounding of one formula also round everything after it anew, so the ratio of
# their errors scatters around 1. Over 48 runs in fp32 (2 families, 12 seeds) the gradients' ratio was 0.84 to 1.56, with
# a geometric mean of 1.01. A lost bit anywhere would show as a factor of 2 and more; that the formula itself is no
# less exact than eager's is held without slack by `test_models.test_the_site_itself`.
SCATTER = 2.0


def operands(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    """Random tensors, one per shape."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def abg(rows: int = 4, width: int = 8, dtype: torch.dtype = torch.float32, gate_width: int = 1) -> list[torch.Tensor]:
    """a, b of [rows, width] and a gate of [rows, gate_width]."""
    a, b, gate = operands((rows, width), (rows, width), (rows, gate_width), dtype=dtype)
    return [a, b, gate]


def captured(function: Callable, *args, **options) -> Report:
    """The report of the Dynamo backend, with inner "eager", over one run of `function`."""
    return fusionpass.explain(function, **options)(*args)


def through_make_fx(function: Callable, *args, mode: str = "fake") -> fusionpass.Rewritten:
    return fusionpass.rewrite(make_fx(function, tracing_mode=mode)(*args))


def through_export(function: Callable, *args) -> fusionpass.Rewritten:
    class Program(torch.nn.Module):
        def forward(self, *inputs):
            return function(*inputs)

    return fusionpass.rewrite(torch.export.export(Program(), tuple(args), strict=False))


def fresh(args) -> list:
    """Copies of the arguments that keep strides and overlaps of views within one tensor."""
    return [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]


def unfused(model: Callable, *, dynamic: bool | None = None) -> Callable:
    """The baseline of an error: the model as the pass would have left it.

    On a CPU that is eager. On CUDA Dynamo's graph alone, with nothing rewritten, rounds otherwise than eager in places
    (rotary tables): on an H100 its gradients' error was 0.71 to 1.68 of eager's over 16 draws, with the pass the same.
    """
    return model if DEVICE == "cpu" else torch.compile(model, backend="eager", dynamic=dynamic)


def relative_error(got: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    """Root mean square of the differences over that of the truth."""
    difference = sum((g.double() - t).square().sum() for g, t in zip(got, truth, strict=True))
    return (difference / sum(t.square().sum() for t in truth)).sqrt().item()


def listing(graph_module, gone: set[str], renamed: dict[str, str]) -> list[tuple]:
    """Every node but those gone, with the names of its inputs, replacements under the name of what they replace."""
    lines = []
    for node in graph_module.graph.nodes:
        if node.name in gone or node.name in renamed:
            continue
        args = torch.fx.map_arg((node.args, node.kwargs), lambda n: renamed.get(n.name, n.name))
        lines.append((node.op, node.name, str(node.target), str(args)))
    return lines


def assert_only_sites_changed(before: GraphModule, after: GraphModule, report: fusionpass.Report) -> None:
    after.graph.lint()
    gone = {name for site in report.rewrites for name in site.nodes}
    renamed = {site.replacement: site.nodes[-1] for site in report.rewrites}
    assert listing(before, gone, {}) == listing(after, set(), renamed)
    for node in after.graph.nodes:
        if node.name in renamed:
            old = next(n for n in before.graph.nodes if n.name == renamed[node.name])
            for key in ("stack_trace", "nn_module_stack"):
                assert node.meta.get(key) == old.meta.get(key)
            assert node.meta["from_node"][0].name == old.name
