"""Guards that no tracer's own graph reaches: what it recorded is changed by hand, and the site is refused by its code."""

import operator
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from programs import stops
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import fusionpass
from fusionpass.engine import run
from fusionpass.graph.vocabulary import Vocabulary
from fusionpass.options import Options
from fusionpass.rules import Operand, Site, guards

S = torch.sigmoid


def formula(a, b, g):
    return a + S(g) * b


def shaped(*shape, stride=None, **options):
    return lambda: torch.empty_strided(shape, stride or torch.empty(shape).stride(), **options)


HALF = shaped(4, 8, dtype=torch.float16)
# what is recorded of a node, in place of float32[4, 8] (g: [4, 1]) on the CPU -> code
RECORDED = {
    "nothing of b": ({"b": None}, "no-metadata"),
    "nothing of the sum": ({"add": None}, "no-metadata"),
    "a gate on another device": ({"g": shaped(4, 1, device="meta")}, "device"),
    "a gate of other rows": ({"g": shaped(3, 1)}, "gate-shape"),
    "a gate of more dims": ({"g": shaped(2, 4, 1)}, "gate-shape"),
    "b of other rows": ({"b": shaped(3, 8)}, "shape"),
    "a sum of another dtype": ({"add": shaped(4, 8, dtype=torch.bfloat16)}, "result"),
    "a sum of a dtype that the op lacks": ({"add": shaped(4, 8, dtype=torch.float64)}, "mixed-dtype"),
    "a sum narrower than what its operands promote to": (
        {"g": shaped(4, 1, dtype=torch.bfloat16), "add": HALF},
        "result",
    ),
    "a gate of float64": ({"g": shaped(4, 1, dtype=torch.float64)}, "mixed-dtype"),
    "a 0-d gate of another dtype": ({"g": shaped(dtype=torch.bfloat16)}, "mixed-dtype"),
    "a 0-d gate": ({"g": shaped()}, "zero-dim"),
    # Where not all is contiguous the op itself is asked what it gives.
    "a sum on another device": ({"a": shaped(4, 8, stride=(1, 4)), "add": shaped(4, 8, device="meta")}, "result"),
    "a sum laid out otherwise": ({"add": shaped(4, 8, stride=(1, 4))}, "stride"),
}


def recorded(changes, function=formula, shapes=((4, 8), (4, 8), (4, 1)), fake=True):
    """The function's graph with what a tracer records of these shapes, but for the changes; these are fake tensors where the
    op itself is asked about them, which subclasses cannot be."""
    graph_module = torch.fx.symbolic_trace(function)
    with FakeTensorMode() as mode, torch.no_grad():
        given = [shape if isinstance(shape, torch.Tensor) else torch.empty(shape) for shape in shapes]
        FakeTensorProp(graph_module, mode).propagate(*given)
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


@pytest.mark.parametrize(("owner", "code"), [(None, None), ("a", "in-place")])
def test_a_residual_is_not_added_into_memory_that_others_read(owner, code):
    """`sum += r`; no tracer records a sum in an input's memory, or there would be no site."""

    def added(r, a, b, g):
        total = formula(a, b, g)
        total += r
        return total

    graph_module = recorded({}, added, ((4, 8), (4, 8), (4, 8), (4, 1)))
    nodes = {node.name: node for node in graph_module.graph.nodes}
    (written,) = (
        node for node in nodes.values() if node.target in (operator.iadd, operator.add) and node.name != "add"
    )
    written.target = operator.iadd  # symbolic_trace writes it down as add
    if owner:
        nodes["add"].meta["val"] = nodes[owner].meta["val"]
    with torch.no_grad():
        _, report = fusionpass.rewrite(graph_module, verify=False)
    assert stops(report.rewrites[0]).get("residual") == code


# what is recorded of the projection's operands -> why it stays outside
PROJECTIONS = {
    "nothing of x": ({"x": None}, "no-metadata"),
    "a weight of two rows": ({"w": shaped(2, 6)}, "gate-columns"),
    "an x on another device": ({"x": shaped(4, 6, device="meta")}, "device"),
    "a weight of another dtype": ({"w": shaped(1, 6, dtype=torch.float16)}, "dtype"),
    "a gate of one row": ({"x": shaped(1, 6), "linear": shaped(1, 1)}, "gate-columns"),
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


def test_a_bias_for_each_row_is_no_projections():
    def projected(x, w, a, b, bias):
        return formula(a, b, torch.addmm(bias, x, w))

    graph_module = recorded({}, projected, ((4, 6), (6, 1), (4, 8), (4, 8), (4, 1)))
    _, report = fusionpass.rewrite(graph_module)
    assert [site.stages for site in report.rewrites] == [["gated_add"]]
    assert stops(report.rewrites[0])["gate_projection"] == "gate-columns"


TURNED = shaped(4, 8, stride=(1, 4))


@pytest.mark.parametrize(
    "changes", [dict.fromkeys(("a", "b", "add"), TURNED), {"rms_norm": TURNED}], ids=["sum", "norm"]
)
def test_the_norm_stays_outside_where_one_result_is_laid_out_otherwise(changes):
    def normed(a, b, g):
        total = formula(a, b, g)
        return total, torch.nn.functional.rms_norm(total, (8,))

    _, report = fusionpass.rewrite(recorded(changes, normed), verify=False)
    assert [site.stages for site in report.rewrites] == [["gated_add"]]
    assert stops(report.rewrites[0])["rms_norm"] == "stride"


@pytest.mark.parametrize(("columns", "code"), [(8, None), (1, "shape")])
def test_a_norms_weight_is_one_number_per_column(columns, code):
    def normed(a, b, g, weight):
        total = formula(a, b, g)
        return total, weight * (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6))

    _, report = fusionpass.rewrite(recorded({}, normed, ((4, 8), (4, 8), (4, 1), (columns,))))
    assert stops(report.rewrites[0]).get("rms_norm") == code


# what is recorded of the weighted sum's operands -> why it stays outside
WEIGHTED_SUMS = {
    "nothing of y": ({"y": None}, "no-metadata"),
    "y of longer rows": ({"y": shaped(4, 16)}, "stride"),
}


@pytest.mark.parametrize(("changes", "code"), [({}, None), *WEIGHTED_SUMS.values()], ids=["", *WEIGHTED_SUMS])
def test_the_weighted_sum_asks_the_same(changes, code):
    def routed(y, w, i, b, g):
        return formula((y[i] * w.reshape(-1, 1)).view(4, 2, 8).sum(1), b, g)

    graph_module = recorded(changes, routed, ((8, 8), (4, 2), torch.arange(8), (4, 8), (4, 1)))
    _, report = fusionpass.rewrite(graph_module, verify=False)
    assert stops(report.rewrites[0]).get("finalize") == code


def test_a_sigmoid_that_another_reader_writes():
    """Through a view of it: what the product reads then is no sigmoid any more."""

    def function(a, b, g):
        gates = S(g)
        gates.select(0, 0).zero_()
        return a + gates * b

    given = recorded({}, function)
    after, report = fusionpass.rewrite(given)
    assert [miss.code for miss in report.misses] == ["mutation-between"]
    assert after.code == given.code


def node_of(target, *args, op="call_function", **kwargs):
    return torch.fx.Graph().create_node(op, target, args, kwargs)


ODD = {
    "a function with one argument more": (node_of(torch.add, 1, 2, 3), "add is called with 3 arguments"),
    "a module with two arguments": (node_of("act", 1, 2, op="call_module"), "module act is called with .1, 2."),
    "a module with a keyword that it has not": (
        node_of("act", op="call_module", y=1),
        "module act is called with .'y'.",
    ),
}


@pytest.mark.parametrize(("node", "said"), ODD.values(), ids=ODD)
def test_an_odd_call(node, said):
    """By hand: torch raises where such a call runs."""
    owner = torch.nn.Module()
    owner.act = torch.nn.Sigmoid()
    oddity = Vocabulary(owner).meaning(node).oddity
    assert oddity.code == "odd-call" and re.search(said, oddity.reason)


def test_a_device_without_kernels(monkeypatch):
    """By hand: no other device is here."""
    monkeypatch.setattr(guards, "_missing_kernel", lambda device, dtype: f"there is no kernel for device {device.type}")
    _, report = fusionpass.rewrite(recorded({}))
    assert [miss.code for miss in report.misses] == ["device"] and "no kernel for device" in report.misses[0].reason


def test_a_factor_written_into_another_operands_memory():
    """By hand: what reads the memory as well is mostly found first."""
    graph = torch.fx.Graph()
    a, b, gate = (graph.placeholder(name) for name in ("a", "b", "gate"))
    written = graph.call_method("sigmoid_", (gate,))
    total = graph.call_function(torch.mul, (written, b))
    site = Site(
        anchor=total,
        operands={"b": Operand(b, read=total)},
        parts=[written, total],
        in_place={written: gate},
    )
    for memory, code in ({gate: {1}, b: {1, 2}}, "in-place"), ({gate: {1}, b: {2}}, None):
        effects = SimpleNamespace(
            other_reader=lambda *asked: None, storages=lambda node, of=memory: frozenset(of[node])
        )
        refusal = guards.factors_owned(site, effects)
        assert (refusal.code if refusal else None) == code


def test_a_write_to_a_value_that_nobody_recorded():
    """Nothing is known of an input's memory, so a write to it may hit the gate."""
    graph = Graph()
    with FakeTensorMode():
        wide, narrow = torch.empty(4, 8), torch.empty(4, 1)

    def recorded(node, value):
        node.meta["example_value"] = value
        return node

    a, g, b = (recorded(graph.placeholder(name), value) for name, value in (("a", wide), ("g", narrow), ("b", wide)))
    unknown = graph.placeholder("unknown")
    s = recorded(graph.call_function(torch.sigmoid, (g,)), narrow)
    graph.call_method("zero_", (unknown,))
    product = recorded(graph.call_function(operator.mul, (s, b)), wide)
    graph.output(recorded(graph.call_function(operator.add, (a, product)), wide))
    outcome = run(GraphModule({}, graph), Options())
    assert not outcome.rewrites and [miss.code for miss in outcome.misses] == ["mutation-between"]
