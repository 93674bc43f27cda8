"""A fused function inside somebody's torch.compile: rewritten in their graph, by their backend; and what export says."""

import copy
import functools
import logging
import types
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from programs import DEVICE, NOTHING, assert_no_less_exact, operands
from torch.utils.checkpoint import checkpoint

import fusionpass
from fusionpass.entry.backend import Backend
from fusionpass.entry.outer_compile import Outer
from fusionpass.options import Options


def formula(module, x):
    return x + torch.sigmoid(module.gate(x)) * module.expert(x)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.expert = torch.nn.Linear(8, 1), torch.nn.Linear(8, 8)

    def forward(self, x):
        return formula(self, x)


class Checkpointing(Block):
    def forward(self, x):
        return checkpoint(lambda x: formula(self, x), x, use_reentrant=False)


class Broken(Block):
    def forward(self, x):
        y = formula(self, x)
        torch._dynamo.graph_break()
        return formula(self, y)


class Siteless(Block):
    def forward(self, x):
        return self.expert(x)


class Raising(Block):
    """Its fused function is left by an exception, which the caller catches."""

    def forward(self, x):
        raise IndexError("as the caller expects")


class Stack(torch.nn.Module):
    """Some layers, what comes between them, and the formula once more, outside of any fused function."""

    def __init__(self, make, between=lambda layer, x: layer(x), layers=2):
        super().__init__()
        self.layers = torch.nn.ModuleList(make() for _ in range(layers))
        self.between = between
        self.last = Block()

    def forward(self, x):
        for layer in self.layers:
            x = self.between(layer, x)
        return formula(self.last, x)


def of_instance(cls, **options):
    cls = of_its_own(cls)
    return lambda: fusionpass.fuse(cls(), **options)


def of_class(cls, **options):
    return fusionpass.fuse(of_its_own(cls), **options)


def of_its_own(cls):
    """A subclass whose forward is another function object, as what is said once per function is not said yet."""
    forward = cls.forward
    own = types.FunctionType(forward.__code__, forward.__globals__, closure=forward.__closure__)
    return type(cls.__name__, (cls,), {"forward": own})


def broken_between(layer, x):
    x = layer(x)
    torch._dynamo.graph_break()
    return x


def checkpointed(layer, x):
    return checkpoint(layer, x, use_reentrant=False)


def caught(layer, x):
    try:
        return layer(x)
    except IndexError:
        return x * 2


class Nested(torch.nn.Module):
    """A fused function within a fused one."""

    def __init__(self):
        super().__init__()
        self.inner, self.own = of_class(Block)(), Block()

    def forward(self, x):
        return formula(self.own, self.inner(x))


# What compiles, and how many sites of how many graphs are rewritten: the formula in Stack.forward itself is left alone.
MODELS = {
    "class": (lambda: Stack(of_class(Block)), 2, 1),
    "instances": (lambda: Stack(of_instance(Block)), 2, 1),
    "a checkpoint around": (lambda: Stack(of_class(Block), checkpointed), 2, 1),
    "a checkpoint within": (lambda: Stack(of_instance(Checkpointing)), 2, 1),
    "nested": (lambda: Stack(of_instance(Nested), layers=1), 2, 1),
    "one that raises": (lambda: Stack(of_instance(Raising), caught), 0, 1),
    "one that raises among others": (
        lambda: torch.nn.Sequential(Stack(of_instance(Raising), caught), of_class(Block)()),
        1,
        1,
    ),
    "the fused module itself": (of_instance(Block), 1, 1),
}
BROKEN = {
    "a graph break outside": (lambda: Stack(of_class(Block), broken_between, layers=1), 1),
    "a graph break within a class's": (lambda: Stack(of_class(Broken), layers=1), 2),
    "a graph break within an instance's": (lambda: Stack(of_instance(Broken), layers=1), 2),
    "a graph break within, strict": (lambda: Stack(of_instance(Broken, strict=True), layers=1), 2),
}


def called(graph_module, example_inputs):
    return graph_module.forward


def inputs(rows: int = 4) -> torch.Tensor:
    return operands((rows, 8))[0].requires_grad_()


def results(run, module, x) -> list[torch.Tensor]:
    """The sum and every gradient."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = run(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


@contextmanager
def as_written():
    """Fused functions run as they are written; what is said of that, by `strict` too, is not these tests' matter."""
    with torch.compiler.set_stance("force_eager"), mock.patch("fusionpass.entry.nothing_rewritten.nothing"):
        yield


def check(module, x, compiled) -> None:
    """Values and gradients are those of the module without anything compiled."""
    with as_written():
        want = results(module, module, x)
    for g, w in zip(results(compiled, module, x), want, strict=True):
        # Sums of at most 8 * 8 products on the way, and what they are of is at most the largest element.
        torch.testing.assert_close(g, w, rtol=0, atol=64 * torch.finfo(w.dtype).eps * max(1, w.abs().max().item()))


BACKENDS = {"aot_eager": "aot_eager", "a callable": called}


@pytest.mark.parametrize(("make", "sites", "graphs"), MODELS.values(), ids=MODELS)
def test_it_is_rewritten_in_their_graph(make, sites, graphs):
    module = make().to(DEVICE)
    with fusionpass.collect() as report:
        check(module, inputs(), torch.compile(module, backend="aot_eager", fullgraph=True))
    assert len(report.rewrites) == sites and report.misses == []
    assert len(report.graphs) == (graphs if sites else 0)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize(("make", "sites"), BROKEN.values(), ids=BROKEN)
def test_graph_breaks(make, sites, backend):
    module = make().to(DEVICE)
    with fusionpass.collect() as report:
        check(module, inputs(), torch.compile(module, backend=backend))
    assert len(report.rewrites) == sites and report.misses == []


@pytest.mark.parametrize(
    "settings",
    [{"backend": "inductor"}, {"mode": "reduce-overhead"}],
    ids=lambda settings: next(iter(settings.values())),
)
def test_inductor(settings):
    """Its kernels are made with the ops opened, as behind our own backend."""
    module = Stack(of_class(Block), layers=1).to(DEVICE)
    compiled = torch.compile(module, fullgraph=True, **settings)
    with torch.no_grad(), fusionpass.collect() as report:
        got = compiled(inputs())
    assert [r.stages for r in report.rewrites] == [["gate_projection", "gated_add"]]
    with as_written(), torch.no_grad():
        torch.testing.assert_close(got, module(inputs()))


def test_sizes_and_equal_options_cause_no_recompile():
    module = Stack(of_instance(Block)).to(DEVICE)
    compiled = torch.compile(module, backend="eager", dynamic=True, fullgraph=True)
    with torch.no_grad(), fusionpass.collect() as report:
        for rows in (3, 5, 19):
            compiled(inputs(rows))
    assert (len(report.graphs), len(report.rewrites), report.executed) == (1, 2, 6)


@pytest.mark.parametrize("make", [of_instance(Block), of_class(Block)], ids=["instances", "class"])
def test_layers_compiled_one_by_one_share_a_graph(make):
    module = Stack(make).to(DEVICE)
    for layer in module.layers:
        layer.compile(backend="eager")
    with torch.no_grad(), fusionpass.collect() as report:
        module(inputs().detach())
    assert (len(report.graphs), report.executed) == (1, 2)


CALLED = {  # the fused module -> what somebody compiles of it
    "module": lambda m: torch.compile(m, backend="eager"),
    "forward": lambda m: torch.compile(m.forward, backend="eager"),
    "partial of it": lambda m: torch.compile(functools.partial(m.forward), backend="eager"),
    "function around": lambda m: torch.compile(lambda x: m(x), backend="eager"),
    "Module.compile": lambda m: (m.compile(backend="eager"), m)[1],
    "fused again": lambda m: fusionpass.fuse(m.forward, rules=["gated_add"]),
    "partial fused": lambda m: fusionpass.fuse(functools.partial(m.forward)),
}


@pytest.mark.parametrize("compiled", CALLED.values(), ids=CALLED)
@pytest.mark.parametrize("make", [of_instance(Block), of_class(Block)], ids=["instance", "class"])
def test_what_may_be_compiled_of_it(make, compiled):
    module = make().to(DEVICE)
    with torch.no_grad(), fusionpass.collect() as report:
        got = compiled(module)(inputs())
        assert_no_less_exact(
            [got], [formula(module, inputs())], [formula(copy.deepcopy(module).double(), inputs().double())]
        )
    assert len(report.rewrites) == 1


@pytest.mark.parametrize("numerics", ["fp32", "eager"])
def test_the_outermost_fused_functions_options_hold(numerics):
    module = fusionpass.fuse(Nested().to(DEVICE), numerics=numerics, rules=["gated_add"])
    graphs = []

    def keeping(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module

    with torch.no_grad():
        torch.compile(module, backend=keeping)(inputs())
    ops = [node for node in graphs[0].graph.nodes if node.target is torch.ops.fusionpass.gated_add.default]
    assert [node.kwargs.get("numerics", "fp32") for node in ops] == [numerics] * 2
    assert not any("fusionpass_target" in node.meta for node in graphs[0].graph.nodes)


OURS = {
    "by name": dict(backend="fusionpass", options={"inner": "eager"}),
    "as an object": dict(backend=Backend(Options())),
}


@pytest.mark.parametrize("settings", OURS.values(), ids=OURS)
def test_our_own_backend_rewrites_once(settings):
    module = Stack(of_class(Block, strict=True)).to(DEVICE)
    with torch.no_grad(), fusionpass.collect() as report:
        torch.compile(module, **settings)(inputs())
    assert (len(report.graphs), len(report.rewrites)) == (1, 3)


def test_what_is_known_of_a_backend():
    inductor = torch._TorchCompileInductorWrapper(
        "max-autotune-no-cudagraphs", {"coordinate_descent_tuning": True}, None
    )
    named = {name: Outer.of(torch._TorchCompileWrapper(name, None, None, None)) for name in ("eager", "aot_eager")}
    assert {name: (outer.inner, outer.tuned, outer.ours) for name, outer in named.items()} == {
        "eager": ("eager", False, False),
        "aot_eager": ("aot_eager", False, False),
    }
    assert (Outer.of(inductor).inner, Outer.of(inductor).tuned) == ("inductor", True)
    assert Outer.of(called).inner is called
    assert Outer.of(Backend(Options())).ours


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("make", [of_instance, of_class], ids=["instances", "class"])
def test_strict_raises_in_their_graph(make, backend):
    compiled = torch.compile(Stack(make(Siteless, strict=True)).to(DEVICE), backend=backend)
    for _ in range(2):
        with pytest.raises(fusionpass.NothingRewritten, match="0 rewritten in 1 graph: no sigmoid feeds"):
            compiled(inputs())


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "fusionpass"]


def test_a_warning_where_nothing_is_rewritten(caplog):
    """The formula beside the fused function does not speak for it."""
    with caplog.at_level(logging.WARNING, logger="fusionpass"):
        torch.compile(Stack(of_class(Siteless)).to(DEVICE), backend="eager")(inputs())
    assert warnings_of(caplog) == [NOTHING]


@pytest.mark.parametrize("strict", [True, False], ids=["strict export", "export"])
@pytest.mark.parametrize("make", [of_instance, of_class], ids=["instances", "class"])
def test_export(make, strict, caplog):
    """The program is the one without fusion; one warning says what to write, and it is so."""
    module = Stack(make(Block)).to(DEVICE)
    with caplog.at_level(logging.WARNING, logger="fusionpass"):
        program = torch.export.export(module, (inputs(),), strict=strict)
    (message,) = warnings_of(caplog)
    assert message.startswith("0 rewritten: torch.export records the fused ")
    assert "call fusionpass.rewrite(exported_program)" in message
    assert not [node for node in program.graph.nodes if "fusionpass" in str(node.target)]
    assert len(fusionpass.rewrite(program).report.rewrites) == 3
    torch.testing.assert_close(program.module()(inputs()), module(inputs()))


@pytest.mark.parametrize("strict", [True, False], ids=["strict export", "export"])
def test_strict_raises_in_export(strict):
    module = Stack(of_class(Block, strict=True)).to(DEVICE)
    with pytest.raises(
        fusionpass.NothingRewritten, match=r"torch.export records .* fusionpass.rewrite\(exported_program\)"
    ):
        torch.export.export(module, (inputs(),), strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_a_torch_without_the_way_in(strict, monkeypatch, caplog):
    """What is asked of Dynamo has no promise to stay: without it the plain graph is compiled, and it is said."""
    from torch._dynamo.comptime import ComptimeContext

    monkeypatch.delattr(ComptimeContext, "_i_will_not_complain_if_bc_breaks_InstructionTranslator")
    module = Stack(of_class(Block, strict=strict)).to(DEVICE)
    compiled = torch.compile(module, backend="eager")
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="fusionpass"):
        if strict:
            with pytest.raises(fusionpass.NothingRewritten, match="cannot reach the backend"):
                compiled(inputs())
            return
        with fusionpass.collect() as report:
            got = compiled(inputs())
        assert report.graphs == []
        with as_written():
            torch.testing.assert_close(got, module(inputs()))
    (message,) = warnings_of(caplog)
    assert 'write torch.compile(model, backend="fusionpass", options={"inner": "inductor"}) there' in message
