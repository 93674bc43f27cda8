"""The ops as plain functions: which calls do without the dispatcher, that they compute the op's bits, and who uses them."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from ops_helpers import DEVICE, DTYPES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fusionpass
import fusionpass.entry.backend
from fusionpass.operators import functions, gate_projected_add, gated_add, implementations

OPS = {
    "gated_add": torch.ops.fusionpass.gated_add.default,
    "gate_projected_add": torch.ops.fusionpass.gate_projected_add.default,
}
DECLARED = {"gated_add": gated_add.OP, "gate_projected_add": gate_projected_add.OP}
DIRECT = {name: op.direct for name, op in DECLARED.items()}
SHAPES = {"gated_add": [(4, 8), (4, 1), (4, 8)], "gate_projected_add": [(4, 6), (1, 6), (1,), (4, 8), (4, 8)]}
both = pytest.mark.parametrize("name", OPS)


def operands(name, dtype=torch.float32, seed=0, lead=()):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((*lead, *shape), generator=generator).to(DEVICE, dtype) for shape in SHAPES[name]]


@pytest.fixture
def through_op(monkeypatch):
    """The calls that went on to the ops: their names."""
    calls = []

    class Counting:
        def __init__(self, name):
            self.name, self.redispatch = name, OPS[name].redispatch

        def __call__(self, *args, **kwargs):
            calls.append(self.name)
            return OPS[self.name](*args, **kwargs)

    for name, op in DECLARED.items():
        monkeypatch.setattr(op, "overload", Counting(name))
    return calls


class PassingDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class PassingFunction(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Tagged(torch.Tensor):
    """A subclass with no rule of its own: results keep the type."""


def within(context):
    def run(function, tensors):
        with context():
            return function(*tensors)

    return run


def gradients(function, tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    assert y.requires_grad
    return y, *torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y).to(y))


def gradient_of_the_last(function, tensors):
    leaf = tensors[-1].detach().requires_grad_()
    y = function(*tensors[:-1], leaf)
    return y, *torch.autograd.grad(y.sum(), leaf)


def double_backward(function, tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    first = torch.autograd.grad(function(*leaves).pow(2).sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)


def dual(function, tensors):
    with forward_ad.dual_level():
        y = function(*tensors[:-1], forward_ad.make_dual(tensors[-1], tensors[0].new_ones(tensors[-1].shape)))
        return tuple(forward_ad.unpack_dual(y))


def dual_level_alone(function, tensors):
    with forward_ad.dual_level():
        return function(*tensors)


def no_grad_of_leaves(function, tensors):
    with torch.no_grad():
        y = function(*[t.detach().requires_grad_() for t in tensors])
    assert not y.requires_grad
    return y


def inference(function, tensors):
    with torch.inference_mode():
        y = function(*[t.clone() for t in tensors])
        assert y.is_inference()
        return y.clone()


def faked(function, tensors):
    with FakeTensorMode() as mode:
        y = function(*map(mode.from_tensor, tensors))
    return torch.empty(y.shape).fill_(y.stride(0))


def faked_outside_the_mode(function, tensors):
    mode = FakeTensorMode()
    y = function(*map(mode.from_tensor, tensors))
    return torch.empty(y.shape).fill_(y.stride(0))


def meta(function, tensors):
    y = function(*[t.to("meta") for t in tensors])
    assert y.is_meta
    return torch.empty(y.shape).fill_(y.stride(0))


def subclass(function, tensors):
    y = function(*tensors[:-1], tensors[-1].as_subclass(Tagged))
    assert type(y) is Tagged
    return y.as_subclass(torch.Tensor)


def negative_view(function, tensors):
    """b is a view that negates as it is read."""
    negative = torch._neg_view(tensors[-1])
    assert negative.is_neg()
    return function(*tensors[:-1], negative)


def vmapped(function, tensors):
    return torch.vmap(lambda *t: function(*t))(*[torch.stack([t, 2 * t]) for t in tensors])


def functional_grad(function, tensors):
    return torch.func.grad(lambda b: function(*tensors[:-1], b).pow(2).sum())(tensors[-1])


def jvp(function, tensors):
    return torch.func.jvp(lambda b: function(*tensors[:-1], b), (tensors[-1],), (tensors[-1].cos(),))


def targets_of(graph):
    return [node.target for node in graph.nodes if node.op == "call_function"]


def in_make_fx(function, tensors):
    graph = make_fx(lambda *t: function(*t))(*tensors)
    assert set(targets_of(graph.graph)) & set(OPS.values())
    return graph(*tensors)


def traced_by_jit(function, tensors):
    graph = torch.jit.trace(lambda *t: function(*t), tuple(tensors), check_trace=False)
    assert "fusionpass::" in str(graph.graph)
    return graph(*[2 * t for t in tensors])


def strided(function, tensors):
    return function(*[t.t().contiguous().t() if t.dim() == 2 else t for t in tensors])


class Situation(NamedTuple):
    run: Callable[..., Any]  # of (function, tensors)
    directly: bool


SITUATIONS = {
    "plain": Situation(lambda f, t: f(*t), True),
    "strided": Situation(strided, True),
    "parameters": Situation(lambda f, t: f(*[torch.nn.Parameter(x) for x in t]).detach(), True),
    "frozen parameters": Situation(lambda f, t: f(*[torch.nn.Parameter(x, requires_grad=False) for x in t]), True),
    "all require grad": Situation(gradients, True),
    "one requires grad": Situation(gradient_of_the_last, True),
    "double backward": Situation(double_backward, True),
    "no_grad": Situation(no_grad_of_leaves, True),
    "inference mode": Situation(inference, True),
    "autocast": Situation(within(lambda: torch.autocast(DEVICE, torch.bfloat16)), False),
    "a view of a view": Situation(lambda f, t: f(*[x[None][0] for x in t]), True),
    "meta tensors": Situation(meta, False),
    "fake tensors": Situation(faked, False),
    "fake tensors, no mode": Situation(faked_outside_the_mode, False),
    "a dispatch mode": Situation(within(PassingDispatch), False),
    "a function mode": Situation(within(PassingFunction), False),
    "a default device": Situation(within(lambda: torch.device(DEVICE)), False),
    "vmap": Situation(vmapped, False),
    "torch.func.grad": Situation(functional_grad, False),
    "torch.func.jvp": Situation(jvp, False),
    "a dual tensor": Situation(dual, False),
    "a dual level": Situation(dual_level_alone, False),
    "a subclass": Situation(subclass, False),
    "a negative view": Situation(negative_view, False),
    "make_fx": Situation(in_make_fx, False),
    "torch.jit.trace": Situation(traced_by_jit, False),
}


def assert_same_bits(got, expected):
    got, expected = ((t,) if isinstance(t, torch.Tensor) else tuple(t) for t in (got, expected))
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == theirs.dtype and mine.stride() == theirs.stride()
        assert torch.equal(mine, theirs)


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:.*torch.jit.*:DeprecationWarning")
@both
@pytest.mark.parametrize(("run", "directly"), SITUATIONS.values(), ids=SITUATIONS)
def test_situations(through_op, name, run, directly):
    tensors = operands(name)
    expected = run(OPS[name], tensors)
    got = run(DIRECT[name], tensors)
    assert set(through_op) == (set() if directly else {name})
    assert_same_bits(got, expected)
    through_op.clear()
    assert_same_bits(DIRECT[name](*tensors), OPS[name](*tensors))  # and nothing of the situation is left
    assert not through_op


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(through_op, name, dtype):
    tensors = operands(name, dtype)
    assert_same_bits(DIRECT[name](*tensors), OPS[name](*tensors))
    assert_same_bits(gradients(DIRECT[name], tensors), gradients(OPS[name], tensors))
    assert not through_op


def test_options_and_no_bias(through_op):
    a, gate, b = operands("gated_add", torch.bfloat16, 3)
    for numerics in ("fp32", "eager"):
        assert_same_bits(*(f(a, gate, b, numerics=numerics) for f in (DIRECT["gated_add"], OPS["gated_add"])))
    x, weight, _, a, b = operands("gate_projected_add")
    assert_same_bits(*(f(x, weight, None, a, b) for f in (DIRECT["gate_projected_add"], OPS["gate_projected_add"])))
    assert not through_op


@pytest.mark.skipif(DEVICE == "cuda", reason="ATen is what a CPU runs")
@both
def test_without_the_interpreter(monkeypatch, name):
    monkeypatch.setattr(implementations, "interpreted", lambda: False)
    tensors = operands(name)
    assert_same_bits(DIRECT[name](*tensors), OPS[name](*tensors))
    assert_same_bits(gradients(DIRECT[name], tensors), gradients(OPS[name], tensors))


@both
def test_dynamo_sees_the_op(name):
    """A graph that contains a direct call, compiled once more, contains the op."""
    seen = []

    def keep(graph_module, example_inputs):
        seen.append(targets_of(graph_module.graph))
        return graph_module

    def function(*tensors):
        return DIRECT[name](*tensors)

    tensors = operands(name)
    got = torch.compile(function, backend=keep, fullgraph=True)(*tensors)
    assert [[t for t in targets if t is not getattr] for targets in seen] == [[OPS[name]]]
    assert_same_bits(got, OPS[name](*tensors))
    assert_same_bits(torch.compile(function, backend="eager", fullgraph=True)(*tensors), OPS[name](*tensors))


BAD = {
    "b's shape": ("gated_add", 2, lambda t: t[:, :7]),
    "gate's rows": ("gated_add", 1, lambda t: t[:3]),
    "gate 0-d": ("gated_add", 1, lambda t: t[0, 0]),
    "dtypes": ("gated_add", 1, lambda t: t.double()),
    "float64": ("gated_add", 0, lambda t: t.double()),
    "x's rows": ("gate_projected_add", 0, lambda t: t[:3]),
    "weight": ("gate_projected_add", 1, lambda t: t[:, :5]),
    "bias": ("gate_projected_add", 2, lambda t: torch.cat([t, t])),
    "b's dtype": ("gate_projected_add", 4, lambda t: t.double()),
}
if DEVICE == "cuda":
    BAD["device"] = "gated_add", 2, lambda t: t.cpu()


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "requires grad"])
@pytest.mark.parametrize(("name", "position", "spoil"), BAD.values(), ids=BAD)
def test_refused_in_the_same_words(name, position, spoil, requires_grad):
    tensors = operands(name)
    tensors[position] = spoil(tensors[position])
    tensors = [t.requires_grad_(requires_grad) for t in tensors]
    told = []
    for function in (OPS[name], DIRECT[name]):
        with pytest.raises(RuntimeError, match=f"fusionpass::{name}: .*allowed: ") as caught:
            function(*tensors)
        told.append(str(caught.value))
    assert told[0] == told[1]


def test_numerics_refused_in_the_same_words():
    tensors, told = operands("gated_add"), []
    for function in (OPS["gated_add"], DIRECT["gated_add"]):
        with pytest.raises(RuntimeError, match="numerics is 'fast'") as caught:
            function(*tensors, numerics="fast")
        told.append(str(caught.value))
    assert told[0] == told[1]


# Who uses them: graphs that Python runs, and no others.


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


def test_one_wrong_bit_is_seen():
    """The comparison above sees one wrong bit."""
    one = torch.ones(3)
    with pytest.raises(AssertionError):
        assert_same_bits(one, one.nextafter(2 * one))
