"""The ops as plain functions: which calls do without the dispatcher, that they compute the op's bits, and refuse alike."""

from collections.abc import Callable
from typing import Any, NamedTuple

import direct_helpers
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from direct_helpers import DIRECT, OPS, assert_same_bits, targets_of
from ops_helpers import DEVICE, DTYPES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fusionpass.operators import implementations

through_op = direct_helpers.through_op

SHAPES = {"gated_add": [(4, 8), (4, 1), (4, 8)], "gate_projected_add": [(4, 6), (1, 6), (1,), (4, 8), (4, 8)]}
both = pytest.mark.parametrize("name", OPS)


def operands(name, dtype=torch.float32, seed=0, lead=()):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((*lead, *shape), generator=generator).to(DEVICE, dtype) for shape in SHAPES[name]]


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


def test_one_wrong_bit_is_seen():
    """The comparison above sees one wrong bit."""
    one = torch.ones(3)
    with pytest.raises(AssertionError):
        assert_same_bits(one, one.nextafter(2 * one))
