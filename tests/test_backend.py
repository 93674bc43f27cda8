"""`torch.compile(model, backend="fusionpass")`: found by name, modes and options, contexts, executions counted."""

import logging

import pytest
import torch
from programs import DEVICE, operands

import fusionpass


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(8, 1)
        self.up = torch.nn.Linear(8, 8)  # a pointwise b might be left to Inductor

    def forward(self, x):
        return x + torch.sigmoid(self.gate(x)) * self.up(x)


def make() -> tuple[Block, torch.Tensor]:
    torch.manual_seed(0)
    return Block().to(DEVICE), operands((4, 8))[0].requires_grad_()


def test_found_by_name():
    assert "fusionpass" in torch._dynamo.list_backends()
    block, x = make()
    with fusionpass.collect() as report:
        got = torch.compile(block, backend="fusionpass", options={"inner": "eager"})(x)
    assert len(report.rewrites) == 1
    torch.testing.assert_close(got, block(x))


WAYS = {
    "default, which is inductor": {},
    "inner inductor": {"options": {"inner": "inductor"}},
    "inner aot_eager": {"options": {"inner": "aot_eager"}},
    "inner cudagraphs": {"options": {"inner": "cudagraphs"}},
    "inner eager, eager numerics": {"options": {"inner": "eager", "numerics": "eager"}},
    "mode default": {"mode": "default"},
    "mode max-autotune-no-cudagraphs": {"mode": "max-autotune-no-cudagraphs"},
    "mode reduce-overhead": {"mode": "reduce-overhead"},
    "a mode beside options": {"options": {"mode": "reduce-overhead", "strict": True}},
    "settings of Inductor's": {"options": {"inductor": {"max_autotune_gemm": False, "triton.cudagraphs": False}}},
    "dynamic": {"dynamic": True, "options": {"inner": "eager"}},
    "fullgraph": {"fullgraph": True, "options": {"inner": "eager"}},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_ways_to_compile(way):
    block, x = make()
    with fusionpass.collect() as report:
        compiled = torch.compile(block, backend="fusionpass", **way)
        got = compiled(x)
        compiled(x)
    assert [r.calls for r in report.rewrites] == [2]
    torch.testing.assert_close(got, block(x))


def test_inner_callable_sees_the_rewritten_graph():
    block, x = make()
    seen = []

    def inner(graph_module, example_inputs):
        seen.append([node.target for node in graph_module.graph.nodes if node.op == "call_function"])
        return graph_module

    torch.compile(block, backend="fusionpass", options={"inner": inner})(x)
    assert torch.ops.fusionpass.gate_projected_add.default in seen[0]
    assert not any("sigmoid" in str(target) for target in seen[0])


BAD = {
    "unknown option": ({"options": {"speed": 9}}, "unknown option 'speed'"),
    "unknown inner": ({"options": {"inner": "gcc"}}, "option 'inner' is 'gcc'"),
    "unknown mode": ({"mode": "fast"}, "mode is 'fast'"),
}


@pytest.mark.parametrize(("way", "message"), BAD.values(), ids=BAD)
def test_bad_options_name_themselves(way, message):
    block, x = make()
    with pytest.raises(Exception, match=message):
        torch.compile(block, backend="fusionpass", **way)(x)
    block(x)


# An option of Inductor's, and what it is refused with.
NOT_INDUCTORS = {
    "mode beside another inner": (
        {"inner": "eager", "mode": "reduce-overhead"},
        ValueError,
        "for Inductor only, .*'eager'",
    ),
    "settings beside another inner": (
        {"inductor": {"max_autotune": True}},
        ValueError,
        "'max_autotune': True.*for Inductor only",
    ),
    "unknown mode": ({"inner": "inductor", "mode": "fast"}, ValueError, "mode is 'fast': allowed are"),
    "mode of another type": ({"inner": "inductor", "mode": 3}, TypeError, "option 'mode' is 3"),
    "unknown setting": (
        {"inner": "inductor", "inductor": {"max_autotun": 1}},
        ValueError,
        "similar names are max_autotune",
    ),
    "settings of another type": ({"inner": "inductor", "inductor": ["max_autotune"]}, TypeError, "it takes a dict"),
}


@pytest.mark.parametrize(("options", "error", "message"), NOT_INDUCTORS.values(), ids=NOT_INDUCTORS)
def test_settings_of_inductor_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        fusionpass.fuse(Block(), **options)
    torch.testing.assert_close(Block()(torch.ones(1, 8)).shape, torch.Size((1, 8)))


def test_an_inner_compiler_that_fails_is_named():
    block, x = make()

    def broken(graph_module, example_inputs):
        raise RuntimeError("no such instruction")

    with pytest.raises(Exception, match="no such instruction") as caught:
        torch.compile(block, backend="fusionpass", options={"inner": broken})(x)
    notes = getattr(caught.value, "__notes__", []) + getattr(caught.value.__cause__, "__notes__", [])
    notes += getattr(getattr(caught.value, "inner_exception", None), "__notes__", [])
    assert any("option inner=" in note for note in notes)
    torch.testing.assert_close(block(x), block(x))


def test_a_whole_graph_without_a_site_warns(caplog):
    with caplog.at_level(logging.WARNING, logger="fusionpass"):
        torch.compile(torch.nn.Tanh(), backend="fusionpass", options={"inner": "eager"})(operands((2, 2))[0])
    assert [r.getMessage()[:11] for r in caplog.records if r.name == "fusionpass"] == ["0 rewritten"]


class OwnModule(torch.nn.Module):
    def forward(self, x):
        return x.tanh()


class Outer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = OwnModule()

    def forward(self, x):
        return self.inner(x) + 1


# What torch.compile is given: a module is compiled by its call, through torch's frames or past them.
WITHOUT_A_SITE = {
    "a module of torch": torch.nn.Tanh(),
    "a module of one's own": OwnModule(),
    "a module within another": Outer(),
    "a sequence": torch.nn.Sequential(OwnModule(), torch.nn.ReLU()),
    "a function": lambda x: x.tanh(),
    "a bound forward": OwnModule().forward,
}


@pytest.mark.parametrize("name", WITHOUT_A_SITE)
def test_strict_raises_from_the_backend(name):
    options = {"inner": "eager", "strict": True}
    with pytest.raises(Exception, match="0 rewritten .*option 'strict' is on"):
        torch.compile(WITHOUT_A_SITE[name], backend="fusionpass", options=options)(operands((2, 2))[0])


def test_collecting_ends_with_its_block():
    block, x = make()
    compiled = torch.compile(block, backend="fusionpass", options={"inner": "eager"})
    with fusionpass.collect() as outer:
        with fusionpass.collect() as report:
            compiled(x)
        compiled(x)
    compiled(x)
    assert [r.calls for r in report.rewrites] == [1]
    assert [r.calls for r in outer.rewrites] == [2]


# ---- contexts of section "child graphs", functorch and subclasses


def _checkpointed(block, x):
    return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)


def _cond(block, x):
    return torch.cond(x.sum() > 0, lambda x: block(x), lambda x: x + torch.sigmoid(x[:, :1]) * x.cos(), (x,))


def _functional_grad(block, x):
    return torch.func.grad(lambda x: block(x).sum())(x)


def _vmapped(block, x):
    return torch.vmap(lambda row: block(row))(x)


def _autocast(block, x):
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        return block(x)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x + torch.sigmoid(x) * x.tanh()

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


# name -> function of (block, x), rewrites, miss codes
CONTEXTS = {
    "checkpoint": (_checkpointed, 1, []),
    "cond, both branches": (_cond, 2, []),
    "torch.func.grad": (_functional_grad, 0, ["functorch"]),
    "vmap": (_vmapped, 0, ["functorch"]),
    "autocast": (_autocast, 1, []),
    "autograd.Function": (lambda block, x: Doubled.apply(x), None, None),
    "no_grad around all": (lambda block, x: torch.no_grad()(lambda: block(x))(), 1, []),
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_contexts(context):
    function, rewrites, codes = CONTEXTS[context]
    block, x = make()
    expected = function(block, x)
    report = fusionpass.explain(lambda x: function(block, x))(x)
    if rewrites is not None:
        assert len(report.rewrites) == rewrites, report.misses
        assert [miss.code for miss in report.misses] == codes
    got = fusionpass.fuse(lambda x: function(block, x))(x)
    # Under autocast eager rounds the gate and the product to bfloat16 on the way, the op once at the end.
    bound = {"rtol": 2**-7, "atol": 2**-7} if context == "autocast" else {}
    torch.testing.assert_close(got, expected, **bound)
    if expected.requires_grad:
        (want,) = torch.autograd.grad(expected.sum(), x)
        (given,) = torch.autograd.grad(got.sum(), x)
        torch.testing.assert_close(given, want, **bound)


def test_a_shared_child_is_rewritten_once():
    block, x = make()

    @torch.compiler.nested_compile_region
    def region(x):
        return block(x)

    report = fusionpass.explain(lambda x: region(region(x)))(x)
    assert len(report.rewrites) == 1
    torch.testing.assert_close(fusionpass.fuse(lambda x: region(region(x)))(x), block(block(x)))


class Tagged(torch.Tensor):
    """A subclass with no rule of its own: results keep the type."""


def test_subclasses_are_refused():
    block, x = make()
    tagged = x.detach().as_subclass(Tagged)
    report = fusionpass.explain(lambda x: x + torch.sigmoid(x) * x.cos())(tagged)
    assert not report.rewrites
    assert {miss.code for miss in report.misses} <= {"subclass"}
    got = fusionpass.fuse(lambda x: x + torch.sigmoid(x) * x.cos())(tagged)
    assert type(got) is Tagged
