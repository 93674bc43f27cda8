"""What people patch in torch itself (methods of Tensor, functions, calls of modules): what is not torch's own stays."""

import functools

import pytest
import torch
import torch.nn.functional as F
from programs import DEVICE, operands

import fusionpass

S = torch.sigmoid


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.act, self.norm = torch.nn.Linear(8, 1), torch.nn.Sigmoid(), torch.nn.RMSNorm(8)

    def forward(self, x, a, b):
        total = x + (a + self.act(self.gate(x)) * b)
        return total, self.norm(total)


class LeafTracer(torch.fx.Tracer):
    def is_leaf_module(self, module, path):
        return True


def symbolic(function):
    return torch.fx.symbolic_trace(function)


def leaves(block):
    return torch.fx.GraphModule(block, LeafTracer().trace(block))


def times_three(function):
    @functools.wraps(function)
    def patched(*args, **kwargs):
        return function(*args, **kwargs) * 3

    return patched


# Methods of Tensor: in a graph of symbolic_trace they stand by their names alone.

METHODS = {
    "sigmoid": lambda x, a, g, b: a + g.sigmoid() * b,
    "mul": lambda x, a, g, b: a + S(g).mul(b),
    "add": lambda x, a, g, b: a.add(S(g) * b),
    "float": lambda x, a, g, b: a + S(g).float() * b,
    "view": lambda x, a, g, b: a + S(g).view(4, 1) * b,
    "contiguous": lambda x, a, g, b: a + (S(g) * b).contiguous(),
    "unsqueeze": lambda x, a, g, b: a + S(g[:, 0]).unsqueeze(-1) * b,
}


@pytest.mark.parametrize("name", METHODS)
def test_a_patched_method(name, monkeypatch):
    args = operands((4, 8), (4, 8), (4, 1), (4, 8))
    with torch.no_grad():
        graph = symbolic(METHODS[name])
        _, report = fusionpass.rewrite(symbolic(METHODS[name]), args)
        assert len(report.rewrites) == 1  # torch's own is rewritten
        monkeypatch.setattr(torch.Tensor, name, times_three(getattr(torch.Tensor, name)))
        after, report = fusionpass.rewrite(symbolic(METHODS[name]), args)
        torch.testing.assert_close(after(*args), graph(*args))
    assert report.rewrites == []


def test_a_method_that_somebody_added(monkeypatch):
    def clone_and_clear(self):
        copied = self.clone()
        self.zero_()
        return copied

    monkeypatch.setattr(torch.Tensor, "taken", clone_and_clear, raising=False)

    def function(a, g, b):
        product = S(g) * b
        taken = b.taken()
        return a + product, taken

    args = operands((4, 8), (4, 1), (4, 8))
    with torch.no_grad():
        graph = symbolic(function)
        after, report = fusionpass.rewrite(symbolic(function), args)
        for got, want in zip(after(*map(torch.clone, args)), graph(*map(torch.clone, args)), strict=True):
            torch.testing.assert_close(got, want)
    assert [miss.code for miss in report.misses] == ["mutation-between"]


class Cache:
    """An object that a graph holds, with methods that go by the names of Tensor's."""

    def __init__(self, memory):
        self.memory = memory

    def view(self, *shape):
        self.memory.zero_()
        return self.memory + 1

    sum = view


@pytest.mark.parametrize("name", ["view", "sum"])
def test_a_method_of_ones_own_object(name):
    class Holder(torch.nn.Module):
        def __init__(self, cache):
            super().__init__()
            self.cache = cache

    def traced():
        a, g, b = operands((4, 8), (4, 1), (4, 8))
        graph = torch.fx.Graph()
        inputs = [graph.placeholder(each) for each in "agb"]
        product = graph.call_function(torch.mul, (graph.call_function(S, (inputs[1],)), inputs[2]))
        shown = graph.call_method(name, (graph.get_attr("cache"), 4, 8))
        graph.output((graph.call_function(torch.add, (inputs[0], product)), shown))
        module = torch.fx.GraphModule(Holder(Cache(b)), graph)
        return module, (a, g, b)

    with torch.no_grad():
        module, args = traced()
        want = module(*args)
        module, args = traced()
        after, report = fusionpass.rewrite(module, args)
        for x, y in zip(after(*args), want, strict=True):
            torch.testing.assert_close(x, y)
    assert report.rewrites == []


# Functions and calls that leaf modules go through.


def patched_function(owner, name):
    return lambda block, monkeypatch: monkeypatch.setattr(owner, name, times_three(getattr(owner, name)))


def patched_call(name):
    def change(block, monkeypatch):
        original = getattr(torch.nn.Module, name)

        @functools.wraps(original)
        def call(self, *args, **kwargs):
            out = original(self, *args, **kwargs)
            return out * 3 if self is block.act else out

        monkeypatch.setattr(torch.nn.Module, name, call)

    return change


def own_call(block, monkeypatch):
    original = block.act._call_impl
    block.act._call_impl = lambda *args, **kwargs: original(*args, **kwargs) * 3


def compiled_call(block, monkeypatch):
    block.act._compiled_call_impl = lambda x: torch.sigmoid(x) * 3


PATCHES = {
    "F.linear": patched_function(F, "linear"),
    "torch.sigmoid": patched_function(torch, "sigmoid"),
    "F.rms_norm": patched_function(F, "rms_norm"),
    "_call_impl of all": patched_call("_call_impl"),
    "__call__ of all": patched_call("__call__"),
    "_call_impl of one": own_call,
    "a compiled call": compiled_call,
}


@pytest.mark.parametrize("name", PATCHES)
def test_a_leaf_module_that_goes_through_a_patch(name, monkeypatch):
    torch.manual_seed(0)
    block, args = Block().to(DEVICE), operands((4, 8), (4, 8), (4, 8))
    with torch.no_grad():
        PATCHES[name](block, monkeypatch)
        graph = leaves(block)
        after, report = fusionpass.rewrite(leaves(block), args)
        for got, want in zip(after(*args), graph(*args), strict=True):
            torch.testing.assert_close(got, want)
    assert report.rewrites == []
