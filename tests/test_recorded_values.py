"""Whatever recorded the values, or none did: the graph is rewritten, or refused for what is not known."""

import pytest
import torch
from programs import DEVICE, Block, operands
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.passes.shape_prop import ShapeProp
from torch.fx.passes.split_module import split_module

import fusionpass
from fusionpass.passes import Pass

S = torch.sigmoid


def formula(a, b, g):
    return a + S(g) * b


def projected(a, b, x, w):
    return a + S(x @ w.t()) * b


def in_place(a, b, g):
    total = a * 2
    return total.add_(S(g) * b).relu()


def laid_out():
    """Operands that are not contiguous, by name: (function, arguments)."""
    a, b, g, wide, gates, w = operands((4, 8), (8, 4), (4, 1), (4, 16), (4, 16), (1, 8))
    return {
        "b transposed": (formula, (a, b.t(), g)),
        "a half of a buffer": (formula, (wide[:, :8], a, g)),
        "the gate a column": (formula, (a, wide[:, 8:], gates[:, 3:4])),
        "a projection": (projected, (wide[:, :8], a, a, w)),
        "x transposed": (projected, (wide[:, :8], b.t(), b.t(), w)),
        "in place": (in_place, (a, b.t(), g)),
    }


def recorded(function, args, device):
    """The graph with the values themselves for records, as an interpreter of one's own leaves them."""
    graph = torch.fx.symbolic_trace(function)

    class Recording(torch.fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            n.meta["val"] = result
            return result

    Recording(graph).run(*(arg.to(device) for arg in args))
    return graph


TRACERS = {
    "real": lambda f, args: make_fx(f, tracing_mode="real")(*args),
    "symbolic": lambda f, args: make_fx(f, tracing_mode="symbolic")(*args),
    "values themselves": lambda f, args: recorded(f, args, DEVICE),
    "meta": lambda f, args: recorded(f, args, "meta"),
}


@pytest.mark.parametrize("tracer", TRACERS.values(), ids=TRACERS)
@pytest.mark.parametrize("name", laid_out())
def test_operands_that_are_not_contiguous(name, tracer):
    function, args = laid_out()[name]
    after, report = fusionpass.rewrite(tracer(function, args))
    assert len(report.rewrites) == 1 and not report.misses
    got, want = after(*args), function(*args)
    assert got.stride() == want.stride()
    torch.testing.assert_close(got, want)


PROPAGATED = {
    "ShapeProp": lambda graph, x: ShapeProp(graph).propagate(x),
    "ShapeProp on fakes": lambda graph, x: on_fakes(graph, x, None),
    "ShapeProp on symbols": lambda graph, x: on_fakes(graph, x, ShapeEnv()),
    "FakeTensorProp": lambda graph, x: FakeTensorProp(graph).propagate(x),
}


def on_fakes(graph, x, shape_env):
    mode = FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True)
    ShapeProp(graph, fake_mode=mode).propagate(mode.from_tensor(x))


@pytest.mark.parametrize("propagated", PROPAGATED.values(), ids=PROPAGATED)
def test_pass_after_what_its_docstring_advises(propagated):
    model, (x,) = Block().to(DEVICE), operands((4, 8))
    graph = torch.fx.symbolic_trace(model)
    if propagated is PROPAGATED["FakeTensorProp"]:
        FakeTensorProp(graph, FakeTensorMode(allow_non_fake_inputs=True)).propagate(x)
    else:
        propagated(graph, x)
    fuse = Pass()
    result = fuse(graph)
    assert result.modified and [site.stages for site in fuse.report.rewrites] == [["gate_projection", "gated_add"]]
    torch.testing.assert_close(result.graph_module(x), model(x))


def test_shape_prop_knows_views_and_writes():
    """It records no memory: which value is a view of which is found again."""

    def function(x, g, b):
        view = b.view(-1)
        product = S(g) * b
        view.add_(1)
        return x + product, x + S(g) * b

    args = operands((4, 8), (4, 1), (4, 8))
    graph = torch.fx.symbolic_trace(function)
    ShapeProp(graph).propagate(*(arg.clone() for arg in args))
    after, report = fusionpass.rewrite(graph)
    assert [miss.code for miss in report.misses] == ["mutation-between"] and len(report.rewrites) == 1
    for got, want in zip(after(*(t.clone() for t in args)), function(*(t.clone() for t in args)), strict=True):
        torch.testing.assert_close(got, want)


def test_shape_prop_of_an_input_that_is_no_tensor():
    graph = torch.fx.symbolic_trace(lambda x, n: x + S(x) * x.cos() * n)
    ShapeProp(graph).propagate(torch.randn(4, 8), 2)
    with pytest.raises(ValueError, match="ShapeProp recorded no value of n, which is no tensor"):
        fusionpass.rewrite(graph)


def split(graph):
    """Cut behind the first sum."""
    nodes = list(graph.graph.nodes)
    first = next(i for i, node in enumerate(nodes) if getattr(node.target, "__name__", "") == "add")
    return split_module(graph, None, lambda node: int(nodes.index(node) > first))


def two_blocks():
    return torch.nn.Sequential(Block(), Block()).to(DEVICE)


def test_pieces_of_a_split_graph():
    model, (x,) = two_blocks(), operands((4, 8))
    after, report = fusionpass.rewrite(split(torch.fx.symbolic_trace(model)), [x])
    assert len(report.rewrites) == 2 and not report.misses
    torch.testing.assert_close(after(x), model(x))


@pytest.mark.parametrize("given", [False, True])
def test_pieces_of_dynamos_graph(given):
    model, (x,) = two_blocks(), operands((4, 8))
    reports = []

    def backend(graph, inputs):
        after, report = fusionpass.rewrite(split(graph), inputs if given else None)
        reports.append(report)
        return after

    torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    assert [len(report.rewrites) for report in reports] == [2]


def test_pieces_whose_outer_graph_alone_has_values():
    model, (x,) = two_blocks(), operands((4, 8))
    pieces = split(torch.fx.symbolic_trace(model))
    FakeTensorProp(pieces, FakeTensorMode(allow_non_fake_inputs=True)).propagate(x)
    after, report = fusionpass.rewrite(pieces)
    assert len(report.rewrites) == 2
    torch.testing.assert_close(after(x), model(x))


class Caller(torch.nn.Module):
    """Calls one graph twice, on (a, b, g) and on what `second` makes of these."""

    def __init__(self, second):
        super().__init__()
        self.inner, self.second = torch.fx.symbolic_trace(formula), second

    def forward(self, a, b, g):
        return self.inner(a, b, g), self.inner(*self.second(a, b, g))


class WholeGraphs(torch.fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, torch.fx.GraphModule)


CALLS = {
    "the same": (lambda a, b, g: (a.cos(), b.sin(), g.exp()), []),
    "other rows": (lambda a, b, g: (a[:2], b[:2], g[:2]), ["no-metadata"]),
    "another dtype": (lambda a, b, g: (a.double(), b.double(), g.double()), ["no-metadata"]),
    "other strides": (lambda a, b, g: (a, b.t().contiguous().t(), g), ["no-metadata"]),
    "one tensor twice": (lambda a, b, g: (a, a, g), ["no-metadata"]),
    "by name": (None, []),
}


@pytest.mark.parametrize(("second", "codes"), CALLS.values(), ids=CALLS)
def test_a_graph_that_is_called_twice(second, codes):
    caller = Caller(second or (lambda a, b, g: (a, b, g)))
    graph = WholeGraphs().trace(caller)
    if second is None:
        for node in graph.nodes:
            if node.op == "call_module":
                node.args, node.kwargs = node.args[:1], {"g": node.args[2], "b": node.args[1]}
    args = operands((4, 8), (4, 8), (4, 1))
    after, report = fusionpass.rewrite(torch.fx.GraphModule(caller, graph), args)
    assert [miss.code for miss in report.misses] == codes
    assert len(report.rewrites) == (0 if codes else 1)
    for got, want in zip(after(*args), caller(*args), strict=True):
        torch.testing.assert_close(got, want)
