"""Memory that nobody declares to be written, or to be shared: the program must do what it does without the pass."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from programs import DEVICE, operands
from torch.fx.experimental.proxy_tensor import make_fx

import fusionpass

S = torch.sigmoid


def fresh(args):
    return [arg.clone() for arg in args]


def codes(report):
    return [miss.code for miss in report.misses]


# Inputs that share memory, from the first call on or in a later one only.


def written_between(a, b, v, g):
    m = S(g) * b
    v.zero_()
    return a + m


def a_written_between(a, b, v, g):
    m = S(g) * b
    v.zero_()
    t = v + m
    return t


def own_memory_written(a, b, v, g):
    m = S(g) * b
    w = v * 1
    w.zero_()
    return a + m + w


def projected(a, b, v, w):
    logit = F.linear(a, w)
    v.zero_()
    return a + S(logit) * b


PROGRAMS = {
    "v": (written_between, 0),
    "a is v": (a_written_between, 0),
    "a copy of v": (own_memory_written, 1),
    "v before the projection's sum": (projected, 1),
}


def separate():
    a, b, v, g = operands((4, 8), (4, 8), (4, 8), (4, 1))
    return [a, b, v, g]


def shared(name):
    a, b, v, g = separate()
    kinds = {
        "b": lambda: [a, b, b, g],
        "a view of b": lambda: [a, b, b[:], g],
        "a": lambda: [a, b, a, g],
        "the gate, in a larger tensor": lambda: [a, b, v, v[:, :1]],
    }
    return kinds[name]()


SHARED = ("b", "a view of b", "a", "the gate, in a larger tensor")


def weighted(args, name):
    return [*args[:3], operands((1, 8), seed=3)[0]] if name.endswith("projection's sum") else args


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("way", SHARED)
def test_shared_in_a_later_call_only(program, way):
    function, sites = PROGRAMS[program]
    with torch.no_grad(), fusionpass.collect() as report:
        fused = fusionpass.fuse(lambda *args: function(*args))
        fused(*weighted(separate(), program))
        got = fused(*weighted(shared(way), program))
    torch.testing.assert_close(got, function(*weighted(shared(way), program)))
    assert len(report.rewrites[:1]) == sites


@pytest.mark.parametrize("mode", ["fake", "real", "symbolic"])
@pytest.mark.parametrize("way", SHARED)
def test_shared_in_a_graph_of_make_fx(way, mode):
    with torch.no_grad():
        graph = make_fx(written_between, tracing_mode=mode)(*separate())
        after, report = fusionpass.rewrite(graph)
        torch.testing.assert_close(after(*shared(way)), graph(*shared(way)))
    assert codes(report) == ["mutation-between"]


def test_a_tensor_that_the_function_knows_by_itself():
    """make_fx gets it anew for each use, and records nothing of it."""
    known = operands((4, 8), seed=5)[0]

    def function(a, g):
        m = S(g) * known
        known.mul_(0.5)
        return a + m

    a, g = operands((4, 8), (4, 1))
    with torch.no_grad():
        graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(a, g)
        before = known.clone()
        want = graph(a, g)
        known.copy_(before)
        after, report = fusionpass.rewrite(graph)
        torch.testing.assert_close(after(a, g), want)
    assert codes(report) == ["mutation-between"]


# Results that are their inputs, though no schema says so.


HANDED_ON = {
    "F.dropout in eval": lambda x: F.dropout(x, 0.5, training=False),
    "torch.dropout in eval": lambda x: torch.dropout(x, 0.5, False),
    "torch.alpha_dropout in eval": lambda x: torch.alpha_dropout(x, 0.5, False),
    "einsum of one": lambda x: torch.einsum("ij->ij", x),
    "type_as": lambda x: x.type_as(x),
    "atleast_1d": torch.atleast_1d,
    "broadcast_tensors": lambda x: torch.broadcast_tensors(x, x)[0],
    "to": lambda x: x.to(torch.float32),
    "contiguous": lambda x: x.contiguous(),
    "positive": lambda x: +x,
}


@pytest.mark.parametrize("tracer", ["dynamo", "make_fx", "pre_dispatch", "symbolic_trace"])
@pytest.mark.parametrize("name", HANDED_ON)
def test_a_result_that_is_its_input(name, tracer):
    """What is written through the second name is b, which the sum would read after the write."""

    def function(a, g, b):
        same = HANDED_ON[name](b)
        product = S(g) * b
        same.zero_()
        return a + product

    args = operands((4, 8), (4, 1), (4, 8))
    with torch.no_grad():
        want = function(*fresh(args))
        if tracer == "dynamo":
            got = fusionpass.fuse(lambda *given: function(*given))(*fresh(args))
        else:
            trace = {
                "make_fx": make_fx(function),
                "pre_dispatch": make_fx(function, pre_dispatch=True),
                "symbolic_trace": lambda *given: torch.fx.symbolic_trace(function),
            }[tracer]
            graph = trace(*fresh(args))
            after, report = fusionpass.rewrite(graph, fresh(args))
            got = after(*fresh(args))
            assert report.rewrites == []
    torch.testing.assert_close(got, want)


ONE_MEMORY = {
    "both factors": lambda a, h: (h.sigmoid_(), a + h * h)[1],
    "a and the gate": lambda a, h: (h.sigmoid_(), h + h * a)[1],
    "a view of the gate": lambda a, h: (h.sigmoid_(), a + h * h[:])[1],
    "a view written": lambda a, h: (h[:].sigmoid_(), a + h * h)[1],
}


@pytest.mark.parametrize("tracer", ["dynamo", "make_fx", "symbolic_trace"])
@pytest.mark.parametrize("name", ONE_MEMORY)
def test_a_factor_in_place_that_is_another_operand_too(name, tracer):
    args = operands((4, 8), (4, 8))
    function = ONE_MEMORY[name]
    with torch.no_grad():
        want = function(*fresh(args))
        if tracer == "dynamo":
            got = fusionpass.fuse(lambda *given: function(*given))(*fresh(args))
        else:
            graph = make_fx(function)(*fresh(args)) if tracer == "make_fx" else torch.fx.symbolic_trace(function)
            got = fusionpass.rewrite(graph, fresh(args)).graph_module(*fresh(args))
    torch.testing.assert_close(got, want)


# Writes that nobody declares: x, a, g, running mean [1, 8], running variance [8].


@torch.fx.wrap
def kept(mean):
    mean.add_(1)
    return mean.sum()


def _instance_norm(x, mean, var, train):
    return F.instance_norm(x.t()[None], mean[0], var, use_input_stats=train)


# what runs between the product and the sum -> whether it writes
STATISTICS = {
    "F.batch_norm": (lambda x, mean, var: F.batch_norm(x, mean[0], var, training=True), True),
    "torch.batch_norm": (
        lambda x, mean, var: torch.batch_norm(x, None, None, mean[0], var, True, 0.1, 1e-5, False),
        True,
    ),
    "native_batch_norm": (
        lambda x, mean, var: torch.native_batch_norm(x, None, None, mean[0], var, True, 0.1, 1e-5)[0],
        True,
    ),
    "_native_batch_norm_legit": (
        lambda x, mean, var: torch.ops.aten._native_batch_norm_legit(x, None, None, mean[0], var, True, 0.1, 1e-5)[0],
        True,
    ),
    "aten.batch_norm": (
        lambda x, mean, var: torch.ops.aten.batch_norm(x, None, None, mean[0], var, True, 0.1, 1e-5, False),
        True,
    ),
    "F.instance_norm": (lambda x, mean, var: _instance_norm(x, mean, var, True), True),
    "F.embedding with max_norm": (
        lambda x, mean, var: F.embedding(torch.zeros(1, dtype=torch.int64, device=x.device), mean, max_norm=1e-3),
        True,
    ),
    "F.batch_norm in eval": (lambda x, mean, var: F.batch_norm(x, mean[0], var, training=False), False),
    "F.embedding": (lambda x, mean, var: F.embedding(torch.zeros(1, dtype=torch.int64, device=x.device), mean), False),
    "layer_norm": (lambda x, mean, var: F.layer_norm(x, (8,), mean[0]), False),
    "a kept function": (lambda x, mean, var: kept(mean), True),
}


def around(statistics):
    def function(x, a, g, mean, var):
        m = S(g) * mean
        n = statistics(x, mean, var)
        return a + m, n

    return function


def statistics_inputs():
    x, a, g = operands((4, 8), (1, 8), (1, 1))
    return [x + 5, a, g, torch.ones(1, 8, device=DEVICE), torch.ones(8, device=DEVICE)]


@pytest.mark.parametrize("tracer", ["dynamo", "fake", "real", "symbolic_trace"])
@pytest.mark.parametrize("name", STATISTICS)
def test_running_statistics(name, tracer):
    statistics, writes = STATISTICS[name]
    if tracer != "symbolic_trace" and name == "a kept function":
        pytest.skip("these tracers look into it")
    function = around(statistics)
    with torch.no_grad():
        if tracer == "dynamo":
            with fusionpass.collect() as report:
                got = fusionpass.fuse(lambda *args: function(*args))(*statistics_inputs())
            want = function(*statistics_inputs())
        else:
            trace = torch.fx.symbolic_trace if tracer == "symbolic_trace" else None
            graph = trace(function) if trace else make_fx(function, tracing_mode=tracer)(*statistics_inputs())
            after, report = fusionpass.rewrite(graph, statistics_inputs())
            got, want = after(*statistics_inputs()), graph(*statistics_inputs())
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)
    if writes:
        assert not report.rewrites and codes(report) == ["mutation-between"]
    elif tracer in ("dynamo", "symbolic_trace"):
        assert len(report.rewrites) == 1


# numpy code, which Dynamo wraps.


def _statement(code):
    scope = {"np": np, "S": S}
    exec(f"def function(a, g, b):\n    m = S(g) * b\n    v = b.numpy()\n    {code}\n    return a + m", scope)
    return scope["function"]


NUMPY = ("v *= 0", "v += 1", "np.add(v, v, out=v)", "v[0] = 3", "v.fill(2)", "v.sort()")


@pytest.mark.skipif(DEVICE != "cpu", reason="numpy shares no memory with a GPU")
@pytest.mark.parametrize("code", NUMPY)
def test_numpy_writes(code):
    function = _statement(code)
    a, g, b = operands((4, 8), (4, 1), (4, 8))
    with torch.no_grad():
        plain = torch.compile(function, backend="eager")(*fresh((a, g, b)))
        torch._dynamo.reset()
        got = fusionpass.fuse(lambda *args: function(*args))(*fresh((a, g, b)))
    torch.testing.assert_close(got, plain)


# Leaf modules with state of their own, in a graph of symbolic_trace.


class Counting(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.ones(4, 8))

    def forward(self, x):
        self.seen.add_(x)
        return x * 1


class BatchNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(8)

    @property
    def seen(self):
        return self.norm.running_mean.expand(4, 8)

    def forward(self, x):
        return self.norm(x)


class Holder(torch.nn.Module):
    def __init__(self, leaf):
        super().__init__()
        self.leaf = leaf

    def forward(self, x, a, g):
        return a + S(g) * self.leaf.seen, self.leaf(x)


class Between(Holder):
    def forward(self, x, a, g):
        m = S(g) * self.leaf.seen
        y = self.leaf(x)
        return a + m, y


@pytest.mark.parametrize(
    ("kind", "leaf", "sites"),
    [(Between, Counting, 0), (Between, BatchNorm, 0), (Holder, Counting, 1), (Holder, BatchNorm, 1)],
)
def test_leaf_modules_with_state(kind, leaf, sites):
    torch.manual_seed(0)
    holder, given = kind(leaf()).to(DEVICE).train(), operands((4, 8), (4, 8), (4, 1))
    given[0] += 5

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, path):
            return isinstance(module, Counting) or super().is_leaf_module(module, path)

    def traced():
        own = copy.deepcopy(holder)
        return torch.fx.GraphModule(own, Tracer().trace(own))

    with torch.no_grad():
        after, report = fusionpass.rewrite(traced(), given)
        want = traced()(*given)
        for x, y in zip(after(*given), want, strict=True):
            torch.testing.assert_close(x, y)
    assert len(report.rewrites) == sites
