"""A node in words: every kind of node, from every tracer."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from fusionpass.graph.naming import describe
from fusionpass.graph.vocabulary import Vocabulary

aten = torch.ops.aten
F32, BF16 = torch.float32, torch.bfloat16
# program of x [4, 8] -> how its last node before the output is told
SYMBOLIC = {
    "an input": (lambda x: x, "x, an input of the graph"),
    "operator": (lambda x: x + x, "add, a sum of two"),
    "with a number": (lambda x: aten.add.Scalar(x, 1), "add_scalar, a sum with a number"),
    "method": (lambda x: x.mul(x), "mul, a product"),
    "in place": (lambda x: x.add_(x), "add_, a sum of two written in place"),
    "function": (lambda x: torch.sigmoid(x), "sigmoid, a sigmoid"),
    "linear": (lambda x: F.linear(x, x), "linear, a linear"),
    "matrix product": (lambda x: x @ x.t(), "matmul, a matrix product"),
    "cast": (lambda x: x.to(BF16), "to, a cast to bfloat16"),
    "cast by a method of that name": (lambda x: x.bfloat16(), "bfloat16, a cast to bfloat16"),
    "cast to what it is": (lambda x: x.to(F32), "to, a cast to the dtype it has, float32"),
    "view": (lambda x: x.view(2, 16), "view, a view"),
    "reshape": (lambda x: torch.reshape(x, (32,)), "reshape, a reshape"),
    "unsqueeze": (lambda x: x.unsqueeze(0), "unsqueeze, an unsqueeze"),
    "item": (lambda x: x[0], "getitem, an item"),
    "gather": (lambda x: x[x.new_zeros(3, dtype=torch.int64)], "getitem, a gather of rows"),
    "transpose": (lambda x: x.t(), "t, a transpose"),
    "norm": (lambda x: F.rms_norm(x, (8,)), "rms_norm, an RMSNorm"),
    "sum": (lambda x: x.sum(1), "sum_1, a sum over dims"),
    "unknown method": (lambda x: x.cumsum(0), "cumsum, Tensor.cumsum"),
    "unknown function": (lambda x: torch.cumsum(x, 0), "cumsum, torch.cumsum"),
    "of torch.nn.functional": (lambda x: F.silu(x), "silu, torch.nn.functional.silu"),
    "unknown overload": (lambda x: aten.cumsum.default(x, 0), "cumsum_default, torch.ops.aten.cumsum.default"),
    "unknown operator": (lambda x: operator.neg(x), "neg, operator.neg"),
}


def last(graph):
    return next(iter(graph.find_nodes(op="output"))).all_input_nodes[0]


@pytest.mark.parametrize("program, expected", SYMBOLIC.values(), ids=SYMBOLIC)
@pytest.mark.parametrize("known", [True, False], ids=["", "without the vocabulary"])
def test_symbolic_trace(program, expected, known):
    graph_module = torch.fx.symbolic_trace(program)
    with FakeTensorMode() as mode:
        x = torch.empty(4, 8)
    FakeTensorProp(graph_module, mode).propagate(x)
    assert describe(last(graph_module.graph), Vocabulary(graph_module) if known else None) == expected


# What aten calls it differs by nothing but the name.
TRACED = {
    "cast": (lambda x: x.to(BF16), ", a cast to bfloat16"),
    "view": (lambda x: x.view(2, 16), ", a view"),
    "product": (lambda x: x * x, ", a product"),
    "matrix product": (lambda x: x @ x.t(), ", a matrix product"),
    "unknown": (lambda x: x.cumsum(0), ", torch.ops.aten.cumsum.default"),
}


@pytest.mark.parametrize("program, expected", TRACED.values(), ids=TRACED)
def test_make_fx_export_and_dynamo(program, expected):
    class Program(torch.nn.Module):
        def forward(self, x):
            return program(x)

    x = torch.ones(4, 8)
    exported = torch.export.export(Program(), (x,)).run_decompositions({})
    for graph_module in (make_fx(program)(x), exported.graph_module):
        assert describe(last(graph_module.graph)).endswith(expected)
    found = []
    torch.compile(Program(), backend=lambda gm, inputs: found.append(last(gm.graph)) or gm.forward)(x)
    text = describe(found[0])
    assert text.endswith(expected) or text.endswith(", Tensor.cumsum")


class Gated(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.act, self.scale = torch.nn.Linear(8, 1), torch.nn.SiLU(), torch.nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.act(self.gate(x)) * self.scale


def test_modules_parameters_and_the_result():
    graph_module = torch.fx.symbolic_trace(Gated())
    told = [describe(node) for node in graph_module.graph.nodes]
    assert told == [
        "x, an input of the graph",
        "gate, a Linear",
        "act, a SiLU",
        "scale, a parameter or buffer",
        "mul, a product",
        "output, the graph's result",
    ]
    alone = torch.fx.Graph()
    missing = alone.call_module("experts.3", (alone.placeholder("x"),))
    assert describe(missing) == "experts_3, the module experts.3"


def _users_own(x):
    return x


def test_what_nobody_knows():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    assert describe(graph.call_function(_users_own, (x,))) == f"_users_own, {__name__}._users_own"
    assert describe(graph.call_function(torch.ops.higher_order.cond, (x,))).endswith("torch.ops.higher_order.cond")
    assert describe(graph.call_method("to", (x, F32))) == "to, the method to"  # of what, nobody recorded
    told = describe(graph.call_function(torch.ops._c10d_functional.all_reduce.default, (x, "sum", "0")))
    assert told.endswith(", torch.ops._c10d_functional.all_reduce.default")
