"""A name counts only for torch's own: ops, functions and modules that merely share one are left alone, and run."""

import functools

import pytest
import torch
import torch.nn.functional as F
from programs import DEVICE, operands, stops
from torch.fx.experimental.proxy_tensor import make_fx

import fusionpass
from fusionpass.graph.identity import name_of

S = torch.sigmoid
LIBRARY = torch.library.Library("identity_test", "FRAGMENT")


def own_op(name, function):
    """A user's op that goes by the name of one of torch's, and computes the function."""
    LIBRARY.define(f"{name}(Tensor x) -> Tensor")
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"identity_test::{name}", lambda x: torch.empty_like(function(x)), lib=LIBRARY)
    return getattr(torch.ops.identity_test, name)


CASTS = {name: own_op(name, lambda x: x * 0.5) for name in "to half float type_as double bfloat16 _to_copy".split()}
VIEWS = {
    name: own_op(name, lambda x: x.flip(0).clone())
    for name in "view reshape flatten squeeze unsqueeze contiguous alias unflatten view_as expand detach".split()
}
FORMULA = {name: own_op(name, lambda x: x * 3) for name in "sigmoid mul linear dropout".split()}
OPS = CASTS | VIEWS | FORMULA


@torch._dynamo.allow_in_graph
def flatten(x):
    return x.flip(0)


@torch.fx.wrap
def half(x):
    return x * 0.5


def before_the_sigmoid(op):
    return lambda x, w, a, b: a + S(op(F.linear(x, w))) * b


def after_the_sigmoid(op):
    return lambda x, w, a, b: a + op(S(F.linear(x, w))) * b


def after_the_product(op):
    return lambda x, w, a, b: a + op(S(F.linear(x, w)) * b)


def before_the_residual(op):
    return lambda x, w, a, b: x + op(a + S(F.linear(x, w)) * b)


PLACES = {f.__name__: f for f in (before_the_sigmoid, after_the_sigmoid, after_the_product, before_the_residual)}


def args():
    return operands((4, 8), (1, 8), (4, 8), (4, 8))


def fused(function):
    return fusionpass.fuse(lambda *given: function(*given))(*args())


def retraced(function):
    return fusionpass.rewrite(make_fx(function)(*args())).graph_module(*args())


def symbolic(function):
    return fusionpass.rewrite(torch.fx.symbolic_trace(function), args()).graph_module(*args())


CALLED = {"flatten in the graph": flatten, "half, wrapped": half, **OPS}


@pytest.mark.parametrize("tracer", [retraced, symbolic])
@pytest.mark.parametrize("name", CALLED)
def test_an_op_of_ones_own_runs(name, tracer):
    with torch.no_grad():
        for place in PLACES.values():
            function = place(CALLED[name])
            torch.testing.assert_close(tracer(function), function(*args()))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["half", "flatten", "contiguous", "sigmoid", "mul", "flatten in the graph"])
def test_an_op_of_ones_own_runs_under_dynamo(name, place):
    function = PLACES[place](CALLED[name])
    with torch.no_grad():
        torch.testing.assert_close(fused(function), function(*args()))


INDEX = own_op("index", lambda y: y.flip(0).clone())


def test_a_gather_of_ones_own_runs():
    def routed(y, k, b, g):
        return INDEX(y * k).view(4, 2, 8).sum(1) + S(g) * b

    given = operands((8, 8), (8, 1), (4, 8), (4, 1))
    with torch.no_grad(), fusionpass.collect() as report:
        got = fusionpass.fuse(routed)(*given)
        torch.testing.assert_close(got, routed(*given))
    assert stops(report.rewrites[0])["finalize"] == "not-a-finalize"


@functools.wraps(torch.flatten)
def wrapping(x):
    return x.flip(0)


KNOWN = {
    "a function": (torch.flatten, "flatten"),
    "a method as a function": (torch.Tensor.flatten, "flatten"),
    "an overload": (torch.ops.aten.flatten.using_ints, "flatten"),
    "a packet": (torch.ops.aten.sigmoid, "sigmoid"),
    "a function of torch.nn.functional": (F.dropout, "dropout"),
    "an operator": (__import__("operator").iadd, "iadd"),
    "a wrapper around a function": (wrapping, ""),
    "a user's function": (flatten, ""),
    "a user's overload": (torch.ops.identity_test.half.default, ""),
    "a user's packet": (torch.ops.identity_test.half, ""),
}


@pytest.mark.parametrize(("target", "name"), KNOWN.values(), ids=KNOWN)
def test_name_of(target, name):
    assert name_of(target) == name


BY_HAND = {
    "packets": lambda a, b, g: torch.ops.aten.add(a, torch.ops.aten.mul(torch.ops.aten.sigmoid(g), b)),
    "methods as functions": lambda a, b, g: torch.Tensor.add(a, torch.Tensor.mul(torch.Tensor.sigmoid(g), b)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_ops_called_by_hand(name):
    given = operands((4, 8), (4, 8), (4, 1))
    with torch.no_grad(), fusionpass.collect() as report:
        got = fusionpass.fuse(BY_HAND[name])(*given)
    torch.testing.assert_close(got, BY_HAND[name](*given))
    assert [site.stages for site in report.rewrites] == [["gated_add"]]


# Leaf modules of a graph of symbolic_trace.


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.act, self.norm = torch.nn.Linear(8, 1), torch.nn.Sigmoid(), torch.nn.RMSNorm(8)

    def forward(self, x, a, b):
        total = x + (a + self.act(self.gate(x)) * b)
        return total, self.norm(total)


def replaced(name):
    def change(block):
        module = getattr(block, name)
        original = module.forward
        module.forward = lambda x: original(x) * 3

    return change


def subclassed(name):
    def change(block):
        module = getattr(block, name)
        kind = type(module)
        module.__class__ = type(kind.__name__, (kind,), {"forward": lambda self, x: kind.forward(self, x) * 3})

    return change


def class_patched(name):
    def change(block):
        kind = type(getattr(block, name))
        original = kind.forward

        @functools.wraps(original)
        def forward(self, x):
            return original(self, x) * 3

        kind.forward = forward
        return lambda: setattr(kind, "forward", original)

    return change


def hooked(name):
    return lambda block: getattr(block, name).register_forward_hook(lambda module, given, out: out * 3) and None


def reparametrised(name):
    return lambda block: torch.nn.utils.parametrizations.weight_norm(getattr(block, name)) and None


def hooked_globally(block):
    from torch.nn.modules.module import register_module_forward_hook

    return register_module_forward_hook(lambda module, given, out: out * 3 if module is block.gate else None).remove


def by_keyword(block):
    block.forward = lambda x, a, b: (total := x + (a + block.act(input=block.gate(input=x)) * b), block.norm(x=total))


NOTHING = ["gate_projection", "gated_add", "residual", "rms_norm"]
# what is done to the block -> what is rewritten of it, None for nothing
CHANGES = {
    "nothing": (lambda block: None, NOTHING),
    "a call by keyword": (by_keyword, NOTHING),
    "a gate's forward on the instance": (replaced("gate"), ["gated_add", "residual", "rms_norm"]),
    "a sigmoid's forward on the instance": (replaced("act"), None),
    "a norm's forward on the instance": (replaced("norm"), ["gate_projection", "gated_add", "residual"]),
    "a subclass of the gate": (subclassed("gate"), ["gated_add", "residual", "rms_norm"]),
    "a subclass of the sigmoid": (subclassed("act"), None),
    "a subclass of the norm": (subclassed("norm"), ["gate_projection", "gated_add", "residual"]),
    "a gate's class patched": (class_patched("gate"), ["gated_add", "residual", "rms_norm"]),
    "a sigmoid's class patched": (class_patched("act"), None),
    "a norm's class patched": (class_patched("norm"), ["gate_projection", "gated_add", "residual"]),
    "a hook on the gate": (hooked("gate"), ["gated_add", "residual", "rms_norm"]),
    "a hook on all modules": (hooked_globally, None),
    "a weight in two parts": (reparametrised("gate"), ["gated_add", "residual", "rms_norm"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_leaf_module_that_is_not_plain(name):
    change, stages = CHANGES[name]
    torch.manual_seed(0)
    block, given = Block().to(DEVICE), operands((4, 8), (4, 8), (4, 8))

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, path):
            return True

    undo = change(block)
    try:
        with torch.no_grad():
            graph = torch.fx.GraphModule(block, Tracer().trace(block))
            after, report = fusionpass.rewrite(graph, given)
            for got, want in zip(after(*given), graph(*given), strict=True):
                torch.testing.assert_close(got, want)
    finally:
        if undo is not None:
            undo()
    assert [site.stages for site in report.rewrites] == ([] if stages is None else [stages])
