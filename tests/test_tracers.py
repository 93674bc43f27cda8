"""A fused forward under other tracers steps aside: they record the program without fusion, and one warning says so."""

import functools
import logging

import pytest
import torch
from programs import DEVICE, operands
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import fusionpass
from fusionpass.entry.recording import recorder


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(8, 1)

    def forward(self, x):
        return x + torch.sigmoid(self.gate(x)) * x.tanh()


def decorated():
    class Decorated(Plain):
        @fusionpass.fuse
        def forward(self, x):
            return x + torch.sigmoid(self.gate(x)) * x.tanh()

    return Decorated()


def instance():
    return fusionpass.fuse(type("Own", (Plain,), {"forward": lambda self, x: Plain.forward(self, x)})())


class Leaves(torch.fx.Tracer):
    """As transformers' tracers do it: it decides itself which modules are leaves, and proxies stand for what they return."""

    def is_leaf_module(self, module, path):
        return isinstance(module, torch.nn.Linear)


def by_tracer(module, x):
    return torch.fx.GraphModule(module, Leaves().trace(module))


def function_of(module):
    return lambda x: module(x)


# The module and an input -> something that is called with an input; the recorder's name.
TRACERS = {
    "symbolic_trace": (lambda m, x: torch.fx.symbolic_trace(m), "torch.fx.symbolic_trace"),
    "a tracer of one's own": (by_tracer, "torch.fx.symbolic_trace"),
    "make_fx": (lambda m, x: make_fx(m)(x), "make_fx"),
    "make_fx of a function": (lambda m, x: make_fx(function_of(m))(x), "make_fx"),
    "make_fx, fake": (lambda m, x: make_fx(m, tracing_mode="fake", _allow_non_fake_inputs=True)(x), "make_fx"),
    "make_fx, symbolic": (lambda m, x: make_fx(m, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x), "make_fx"),
    "make_fx, pre_dispatch": (lambda m, x: make_fx(m, pre_dispatch=True)(x), "make_fx"),
    "jit.trace": (lambda m, x: torch.jit.trace(m, x), "torch.jit.trace"),
    "export": (lambda m, x: torch.export.export(m, (x,), strict=False).module(), "torch.export"),
}


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "fusionpass"]


@pytest.mark.parametrize(("trace", "who"), TRACERS.values(), ids=TRACERS)
@pytest.mark.parametrize("make", [instance, decorated])
def test_the_plain_forward_is_recorded(make, trace, who, caplog):
    module = torch.nn.Sequential(fused := make(), torch.nn.Tanh()).to(DEVICE)
    (x,) = operands((4, 8))
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="fusionpass"):
        recorded = trace(module, x)
        trace(module, x)
        torch.testing.assert_close(recorded(x), Plain.forward(fused, x).tanh())
    assert [message.split(" records ")[0] for message in warnings_of(caplog)] == [f"0 rewritten: {who}"]
    if isinstance(recorded, torch.fx.GraphModule):
        assert not [node for node in recorded.graph.nodes if "fusionpass" in str(node.target)]
        assert len(fusionpass.rewrite(recorded, [x] if "fx" in who and who != "make_fx" else None).report.rewrites) == 1
    assert recorder() is None


@pytest.mark.parametrize(("trace", "who"), TRACERS.values(), ids=TRACERS)
def test_strict_raises(trace, who):
    module = torch.nn.Sequential(fusionpass.fuse(Plain(), strict=True)).to(DEVICE)
    with pytest.raises(fusionpass.NothingRewritten, match=f"{who} records the fused Plain.forward"):
        trace(module, operands((4, 8))[0])


def test_concrete_args():
    @fusionpass.fuse
    def function(a, gate, b, scale=None):
        return a + torch.sigmoid(gate) * (b if scale is None else b * scale)

    graph_module = torch.fx.symbolic_trace(function, concrete_args={"scale": None})
    operand = operands((4, 8), (4, 1), (4, 8))
    assert [node.name for node in graph_module.graph.nodes if node.op == "placeholder"][:3] == ["a", "gate", "b"]
    torch.testing.assert_close(graph_module(*operand, None), operand[0] + torch.sigmoid(operand[1]) * operand[2])


TRANSFORMS = {
    "vmap": lambda f, x: torch.vmap(f)(x[None]),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(lambda x: f(x).sum()))(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("make", [instance, decorated])
def test_transforms(make, transform, caplog):
    module = make().to(DEVICE)
    (x,) = operands((4, 8))
    with caplog.at_level(logging.WARNING, logger="fusionpass"):
        got = transform(module, x)
    torch.testing.assert_close(got, transform(functools.partial(Plain.forward, module), x))
    assert [message.split(" the ")[0] for message in warnings_of(caplog)] == [
        "0 rewritten: under a torch.func transform"
    ]


def fake(make):
    with FakeTensorMode():
        return make()(torch.randn(4, 8))


def counted(make):
    with FlopCounterMode(display=False):
        return make()(torch.randn(4, 8))


WITHOUT_NUMBERS = {
    "fake tensors": fake,
    "meta tensors": lambda make: make().to("meta")(torch.empty(4, 8, device="meta")),
    "a counter of operations": counted,
}


@pytest.mark.parametrize("run", WITHOUT_NUMBERS.values(), ids=WITHOUT_NUMBERS)
@pytest.mark.parametrize("make", [instance, decorated])
def test_modes_that_record_nothing(make, run):
    with torch.no_grad():
        assert run(make).shape == (4, 8)


def test_torch_jit_script():
    """TorchScript reads the source behind a decorated forward; that of a fused instance it says it cannot read."""
    module, (x,) = decorated().to(DEVICE), operands((4, 8))
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(module)(x), Plain.forward(module, x))
        fused = fusionpass.fuse(Plain().to(DEVICE))
        with pytest.raises(TypeError, match="FusedForward"):
            torch.jit.script(fused)
        del fused.forward
        torch.testing.assert_close(torch.jit.script(fused)(x), Plain.forward(fused, x))
