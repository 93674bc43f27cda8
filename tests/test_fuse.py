"""`fuse` on everything it takes; copies stay fused; equal layers compile once; strict and the warning tell the truth."""

import copy
import inspect
import logging
import pickle

import pytest
import torch
from programs import DEVICE, NOTHING, operands

import fusionpass


class Block(torch.nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.gate = torch.nn.Linear(width, 1)
        self.expert = torch.nn.Linear(width, width)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x * scale + torch.sigmoid(self.gate(x)) * self.expert(x)


class Stack(torch.nn.Module):
    def __init__(self, block: type = Block, layers: int = 4):
        super().__init__()
        self.layers = torch.nn.ModuleList(block() for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Plain(torch.nn.Module):
    def forward(self, x):
        return x * 2


def plain_function(x):
    return x + 1


@fusionpass.fuse
def combine(a, gate, b):
    """Docstring kept."""
    return a + torch.sigmoid(gate) * b


@pytest.fixture
def x() -> torch.Tensor:
    return operands((4, 8))[0].requires_grad_()


def test_function():
    a, gate, b = operands((4, 8), (4, 1), (4, 8))
    with fusionpass.collect() as report:
        got = combine(a, gate, b)
    assert len(report.rewrites) == 1
    assert combine.__name__ == "combine" and combine.__doc__ == "Docstring kept."
    assert pickle.loads(pickle.dumps(combine)) is combine
    torch.testing.assert_close(got, a + torch.sigmoid(gate) * b)


def test_decorated_forward_with_options(x):
    class Own(Block):
        @fusionpass.fuse(numerics="eager", inner="aot_eager")
        def forward(self, x, scale=1.0):
            return x * scale + torch.sigmoid(self.gate(x)) * self.expert(x)

    block = Own().to(DEVICE)
    with fusionpass.collect() as report:
        got = block(x)
    assert [r.stages for r in report.rewrites] == [["gated_add"]]
    torch.testing.assert_close(got, Block.forward(block, x))


def test_module_class(x):
    Fused = fusionpass.fuse(type("Fused", (Block,), {"forward": Block.forward}))
    stack = Stack(Fused).to(DEVICE)
    with fusionpass.collect() as report:
        got = stack(x)
    assert len(report.graphs) == 1, "four equal layers compile once"
    assert report.executed == 4
    expected = x
    for layer in stack.layers:
        expected = Block.forward(layer, expected)
    torch.testing.assert_close(got, expected)


def test_decorator_on_a_class(x):
    @fusionpass.fuse
    class Own(Block):
        def forward(self, x):
            return x + torch.sigmoid(self.gate(x)) * self.expert(x)

    with fusionpass.collect() as report:
        Own().to(DEVICE)(x)
    assert len(report.rewrites) == 1
    assert isinstance(Own(), Block)


def test_module_instance_keeps_its_face(x):
    block = Block().to(DEVICE)
    expected, keys, signature = block(x), list(block.state_dict()), inspect.signature(block.forward)
    fused = fusionpass.fuse(block)
    with fusionpass.collect() as report:
        got = fused(x)
    assert fused is block and type(fused) is Block
    assert list(fused.state_dict()) == keys
    assert inspect.signature(fused.forward) == signature
    assert [r.stages for r in report.rewrites] == [["gate_projection", "gated_add"]]
    torch.testing.assert_close(got, expected)
    del block.forward
    torch.testing.assert_close(block(x), expected, rtol=0, atol=0)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "deepcopy of a used module": lambda module: (module(torch.randn(2, 8, device=DEVICE)), copy.deepcopy(module))[1],
    "fused twice": fusionpass.fuse,
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_stay_fused_and_are_their_own(duplicate, x):
    original = fusionpass.fuse(Block().to(DEVICE))
    copied = duplicate(original)
    with torch.no_grad():
        copied.gate.weight.zero_()
        expected = Block.forward(copied, x)
    torch._dynamo.reset()
    with fusionpass.collect() as report:
        got = copied(x)
    assert len(report.rewrites) == 1
    assert copied.forward.module is copied
    torch.testing.assert_close(got, expected)


def test_equal_instances_compile_once(x):
    stack = Stack().to(DEVICE)
    for layer in stack.layers:
        fusionpass.fuse(layer)
    with fusionpass.collect() as report:
        stack(x)
    assert len(report.graphs) == 1 and report.executed == 4


def test_fused_block_inside_a_compiled_model_is_part_of_its_graph(x):
    stack = Stack().to(DEVICE)
    for layer in stack.layers:
        fusionpass.fuse(layer)
    report = fusionpass.explain(stack)(x)
    assert len(report.graphs) == 1 and len(report.rewrites) == 4
    assert [r.module for r in report.rewrites] == [f"layers.{i}" for i in range(4)]


def test_training_through_a_fused_module(x):
    block = Block().to(DEVICE)
    twin = fusionpass.fuse(copy.deepcopy(block))
    for module in (block, twin):
        module(x).square().sum().backward()
    for (name, got), want in zip(twin.named_parameters(), block.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, msg=name)


def test_one_compile_over_several_sizes(x):
    sizes = []

    def inner(graph_module, example_inputs):
        sizes.append(1)
        return graph_module

    fused = torch.compile(Block().to(DEVICE), backend=fusionpass.entry.backend.Backend(_options(inner)), dynamic=True)
    for rows in (2, 3, 17, 4096):
        fused(torch.randn(rows, 8, device=DEVICE))
    assert len(sizes) == 1


def _options(inner):
    from fusionpass.options import Options

    return Options.from_user({"inner": inner})


def test_zero_rewrites_warn_once(caplog, x):
    fused = fusionpass.fuse(Plain())
    with caplog.at_level(logging.WARNING, logger="fusionpass"):
        fused(x)
        fused(x)
    assert [r.getMessage() for r in caplog.records if r.name == "fusionpass"] == [NOTHING]


def test_the_warning_names_the_reasons(caplog, x):
    fused = fusionpass.fuse(lambda x: x + 2 * torch.sigmoid(x) * x)
    with caplog.at_level(logging.WARNING, logger="fusionpass"):
        fused(x)
    (record,) = [r for r in caplog.records if r.name == "fusionpass"]
    assert "1 near miss: 1 x scaled" in record.getMessage()


def test_one_warning_over_graph_breaks(caplog, x):
    def broken(x):
        x = x * 2
        torch._dynamo.graph_break()
        return x + 1

    with caplog.at_level(logging.WARNING, logger="fusionpass"):
        fusionpass.fuse(broken)(x)
    assert len([r for r in caplog.records if r.name == "fusionpass"]) == 1


def test_strict_raises_every_time(x):
    fused = fusionpass.fuse(Plain(), strict=True)
    for _ in range(2):
        with pytest.raises(fusionpass.NothingRewritten, match="0 rewritten"):
            fused(x)


def test_strict_is_content_with_a_site_behind_a_graph_break(x):
    def broken(x):
        x = x * 2
        torch._dynamo.graph_break()
        return x + torch.sigmoid(x) * x

    fusionpass.fuse(broken, strict=True)(x)


BAD = {
    "a number": (lambda: fusionpass.fuse(3), TypeError, "it takes a function"),
    "a class that is no module": (lambda: fusionpass.fuse(dict), TypeError, "nn.Module classes"),
    "unknown option": (lambda: fusionpass.fuse(Plain(), speed=9), ValueError, "unknown option 'speed'"),
    "unknown inner": (lambda: fusionpass.fuse(Plain(), inner="gcc"), ValueError, "option 'inner' is 'gcc'"),
    "itself as inner": (lambda: fusionpass.fuse(Plain(), inner="fusionpass"), ValueError, "itself"),
    "inner of a wrong type": (lambda: fusionpass.fuse(Plain(), inner=3), TypeError, "option 'inner' is 3"),
    "unknown rule": (lambda: fusionpass.fuse(Plain(), rules=["softmax"]), ValueError, "allowed are gated_add"),
    "rules as a string": (lambda: fusionpass.fuse(Plain(), rules="gated_add"), TypeError, "list of names"),
    "rules without the core": (lambda: fusionpass.fuse(Plain(), rules=["gate_projection"]), ValueError, "core"),
    "unknown numerics": (lambda: fusionpass.fuse(Plain(), numerics="bf16"), ValueError, "'fp32' and 'eager'"),
    "strict of a wrong type": (lambda: fusionpass.fuse(Plain(), strict="yes"), TypeError, "True or False"),
    "explain of a number": (lambda: fusionpass.explain(3), TypeError, "explain was given 3"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
