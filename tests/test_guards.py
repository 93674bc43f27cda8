"""Guards that no tracer's own graph reaches: what it recorded is changed by hand, and the site is refused by its code."""

from contextlib import nullcontext

import pytest
import torch
from programs import stops
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import fusionpass

S = torch.sigmoid


def formula(a, b, g):
    return a + S(g) * b


def shaped(*shape, stride=None, **options):
    return lambda: torch.empty_strided(shape, stride or torch.empty(shape).stride(), **options)


# what is recorded of a node, in place of float32[4, 8] (g: [4, 1]) on the CPU -> code
RECORDED = {
    "nothing of b": ({"b": None}, "no-metadata"),
    "nothing of the sum": ({"add": None}, "no-metadata"),
    "a gate on another device": ({"g": shaped(4, 1, device="meta")}, "device"),
    "a gate of other rows": ({"g": shaped(3, 1)}, "gate-shape"),
    "a gate of more dims": ({"g": shaped(2, 4, 1)}, "gate-shape"),
    "b of other rows": ({"b": shaped(3, 8)}, "shape"),
    "a sum of another dtype": ({"add": shaped(4, 8, dtype=torch.bfloat16)}, "mixed-dtype"),
    # Where not all is contiguous the op itself is asked what it gives.
    "a sum on another device": ({"a": shaped(4, 8, stride=(1, 4)), "add": shaped(4, 8, device="meta")}, "result"),
    "a sum laid out otherwise": ({"add": shaped(4, 8, stride=(1, 4))}, "stride"),
}


def recorded(changes, function=formula, shapes=((4, 8), (4, 8), (4, 1)), fake=True):
    """The function's graph with what a tracer records of these shapes, but for the changes; these are fake tensors where the
    op itself is asked about them, which subclasses cannot be."""
    graph_module = torch.fx.symbolic_trace(function)
    with FakeTensorMode() as mode, torch.no_grad():
        FakeTensorProp(graph_module, mode).propagate(*map(torch.empty, shapes))
    for node in graph_module.graph.nodes:
        change = changes.get(node.name, node)
        if change is None:
            node.meta.pop("val")
        elif change is not node:
            with mode if fake else nullcontext():
                node.meta["val"] = change()
    return graph_module


@pytest.mark.parametrize(("changes", "code"), RECORDED.values(), ids=RECORDED)
def test_refused(changes, code):
    given = recorded(changes)
    after, report = fusionpass.rewrite(given)
    assert [miss.code for miss in report.misses] == [code]
    assert after.code == given.code


def test_rewritten_as_recorded():
    _, report = fusionpass.rewrite(recorded({}))
    assert [site.stages for site in report.rewrites] == [["gated_add"]]
    assert stops(report.rewrites[0])["gate_projection"] == "not-a-projection"


class Sub(torch.Tensor):
    """A subclass with no rule of its own."""


# what is recorded of the residual -> why the stage stays outside
RESIDUALS = {
    "a subclass": (lambda: torch.empty(4, 8).as_subclass(Sub), "subclass"),
    "sparse": (lambda: torch.zeros(4, 8).to_sparse(), "subclass"),
    "on another device": (shaped(4, 8, device="meta"), "device"),
}


@pytest.mark.parametrize(("change", "code"), RESIDUALS.values(), ids=RESIDUALS)
def test_stages_ask_the_same(change, code):
    graph_module = recorded(
        {"r": change}, lambda r, a, b, g: r + formula(a, b, g), ((4, 8), (4, 8), (4, 8), (4, 1)), False
    )
    with torch.no_grad():
        _, report = fusionpass.rewrite(graph_module)
    assert [site.stages for site in report.rewrites] == [["gated_add"]]
    assert stops(report.rewrites[0])["residual"] == code


# what is recorded of the projection's operands -> why it stays outside
PROJECTIONS = {
    "nothing of x": ({"x": None}, "no-metadata"),
    "a weight of two rows": ({"w": shaped(2, 6)}, "gate-columns"),
    "an x on another device": ({"x": shaped(4, 6, device="meta")}, "device"),
    "a weight of another dtype": ({"w": shaped(1, 6, dtype=torch.float16)}, "dtype"),
    "a weight of a subclass": ({"w": lambda: torch.empty(1, 6).as_subclass(Sub)}, "subclass"),
}


@pytest.mark.parametrize(("changes", "code"), PROJECTIONS.values(), ids=PROJECTIONS)
def test_the_projection_asks_the_same(changes, code):
    def projected(x, w, a, b):
        return formula(a, b, torch.nn.functional.linear(x, w))

    graph_module = recorded(changes, projected, ((4, 6), (1, 6), (4, 8), (4, 8)), False)
    with torch.no_grad():
        _, report = fusionpass.rewrite(graph_module, verify=False)
    assert [site.stages for site in report.rewrites] == [["gated_add"]]
    assert stops(report.rewrites[0])["gate_projection"] == code
