"""Who uses the ops as plain functions: graphs that Python runs, and no others."""

import copy

import direct_helpers
import pytest
import torch
from direct_helpers import DIRECT, OPS, targets_of
from ops_helpers import DEVICE
from torch.fx.experimental.proxy_tensor import make_fx

import fusionpass
import fusionpass.entry.backend
from fusionpass.operators import functions

through_op = direct_helpers.through_op


class Block(torch.nn.Module):
    """One site of each op."""

    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(8, 1)

    def forward(self, x, logits):
        y = x + torch.sigmoid(self.gate(x)) * x.tanh()
        return y + torch.sigmoid(logits) * y.cos()


class Checkpointed(Block):
    def forward(self, x, logits):
        return torch.utils.checkpoint.checkpoint(super().forward, x, logits, use_reentrant=False)


def inputs(block=Block):
    torch.manual_seed(0)
    return block().to(DEVICE), (torch.randn(4, 8, device=DEVICE, requires_grad=True), torch.randn(4, 1, device=DEVICE))


def all_targets(graph_module):
    """Of the graph and its children."""
    return [t for m in graph_module.modules() if isinstance(m, torch.fx.GraphModule) for t in targets_of(m.graph)]


def compiled_graph(block, args, inner):
    """The graph that the backend leaves to the inner compiler or to Python, and the compiled block's result."""
    graphs = []

    def backend(graph_module, example_inputs):
        graphs.append(graph_module)
        return fusionpass.entry.backend.fusionpass(graph_module, example_inputs, options={"inner": inner})

    y = torch.compile(block, backend=backend, fullgraph=True)(*args)
    (graph,) = graphs
    return graph, y


INNERS = {
    "eager": ("eager", DIRECT),
    "aot_eager": ("aot_eager", OPS),
    "callable": (lambda graph_module, example_inputs: graph_module, OPS),
}


@pytest.mark.parametrize("block", [Block, Checkpointed])
@pytest.mark.parametrize(("inner", "functions"), INNERS.values(), ids=INNERS)
def test_backend(block, inner, functions):
    module, args = inputs(block)
    graph, y = compiled_graph(module, args, inner)
    targets = [t for t in all_targets(graph) if t in OPS.values() or t in DIRECT.values()]
    assert sorted(targets, key=str) == sorted(functions.values(), key=str)
    assert torch.sigmoid not in all_targets(graph)
    expected = module(*args)
    torch.testing.assert_close(y, expected)
    wanted = [args[0], *module.parameters()]
    grads = (torch.autograd.grad(value.pow(2).sum(), wanted) for value in (y, expected))
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_a_direct_graph_is_a_graph():
    """It can be copied, written out again and traced once more."""
    module, args = inputs()
    graph, y = compiled_graph(module, args, "eager")
    example = [v.detach() if isinstance(v, torch.Tensor) else v for v in placeholders(graph, module, args)]
    expected = graph(*example)
    for other in (copy.deepcopy(graph), graph):
        other.graph.lint()
        other.recompile()
        for got, want in zip(other(*example), expected, strict=True):
            assert torch.equal(got, want)
    assert torch.equal(expected[0], y)


def placeholders(graph, module, args):
    """Values of the graph's inputs, by the names that Dynamo gives them."""
    known = {"weight": module.gate.weight, "bias": module.gate.bias, "logits": args[1], "l_x_": args[0]}
    names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    return [next(value for part, value in known.items() if part in name) for name in names]


def test_the_backend_calls_past_the_dispatcher(through_op):
    module, args = inputs()
    graph, y = compiled_graph(module, args, "eager")
    assert not through_op
    torch.testing.assert_close(y, module(*args))


@pytest.mark.parametrize("tracer", ["make_fx", "export"])
def test_rewrite_keeps_the_ops(tracer):
    module, args = inputs()
    module.requires_grad_(False)
    args = tuple(t.detach() for t in args)
    graph = make_fx(module)(*args) if tracer == "make_fx" else torch.export.export(module, args)
    rewritten = fusionpass.rewrite(graph).graph_module
    targets = targets_of(rewritten.graph)
    assert set(OPS.values()) <= set(targets) and not set(DIRECT.values()) & set(targets)


def test_a_graph_without_a_site_is_left_alone():
    graph = torch.fx.symbolic_trace(torch.nn.Tanh())
    code = graph.code
    functions.call_directly(graph)
    assert graph.code == code
