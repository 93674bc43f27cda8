"""What `rewrite` is given stays as it is, in values, Python state and random streams; the copy keeps all that it had."""

import random

import numpy
import pytest
import torch
from programs import DEVICE, Block, operands
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.split_module import split_module
from torch.nn.utils import parametrizations

import fusionpass

S = torch.sigmoid


class Counting(torch.nn.Module):
    """A leaf module of one's own: it writes a buffer, counts, keeps a list, makes a cache and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.calls, self.shapes = 0, []

    def forward(self, x):
        self.seen += 1
        self.calls += 1
        self.shapes.append(tuple(x.shape))
        if not hasattr(self, "scale"):
            self.scale = torch.rand(8, device=x.device) + random.random() + numpy.random.rand()
        return x * self.scale


def hooked():
    """The hook keeps what it sees on the module, and reads a number, which no fake has."""
    linear = torch.nn.Linear(8, 8)
    linear.largest = []
    linear.register_forward_hook(lambda module, given, result: module.largest.append(result.abs().max().item()))
    return linear


LEAVES = {
    "batch norm": lambda: torch.nn.BatchNorm1d(8),
    "one's own": Counting,
    "spectral norm": lambda: parametrizations.spectral_norm(torch.nn.Linear(8, 8)),
    "spectral norm by hooks": lambda: torch.nn.utils.spectral_norm(torch.nn.Linear(8, 8)),
    "dropout": lambda: torch.nn.Dropout(0.5),
    "not yet initialised": lambda: torch.nn.LazyLinear(8),
    "hooks": hooked,
}


class WithLeaf(torch.nn.Module):
    def __init__(self, leaf):
        super().__init__()
        self.gate, self.leaf = torch.nn.Linear(8, 1), leaf

    def forward(self, x, a, b):
        return a + S(self.gate(x)) * b, self.leaf(x)


class Tracer(torch.fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, Counting) or super().is_leaf_module(module, name)


def state(module):
    """All that the module holds: tensors by value, the rest by its own equality."""
    held = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    tensors = {
        name: None if torch.nn.parameter.is_lazy(value) else value.clone()
        for name, value in (*module.named_parameters(), *module.named_buffers())
    }
    return {name: list(value) if isinstance(value, list) else value for name, value in held.items()}, tensors


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("leaf", LEAVES.values(), ids=LEAVES)
def test_the_models_own_updates_are_not_run(leaf, mode):
    model = WithLeaf(leaf()).to(DEVICE).train()
    given = torch.fx.GraphModule(model, Tracer().trace(model))
    before, tensors = state(model.leaf)
    streams = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    with mode():
        after, report = fusionpass.rewrite(given, operands((4, 8), (4, 8), (4, 8)))
    assert len(report.rewrites) == 1 and after.leaf is model.leaf is given.leaf
    now, tensors_now = state(model.leaf)
    assert now.keys() == before.keys() and tensors_now.keys() == tensors.keys()
    for name, value in before.items():
        assert now[name] is value or (now[name] == value and not isinstance(value, torch.Tensor))
    for name, value in tensors.items():
        assert value is None or torch.equal(tensors_now[name], value)
    assert torch.equal(torch.get_rng_state(), streams[0]) and random.getstate() == streams[1]
    assert (numpy.random.get_state()[1] == streams[2]).all()


def test_buffers_that_the_graph_itself_writes():
    class Writing(Block):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen.add_(1)
            return super().forward(x)

    model, tracer = Writing().to(DEVICE), torch.fx.Tracer()
    tracer.proxy_buffer_attributes = True
    given = torch.fx.GraphModule(model, tracer.trace(model))
    assert "add_" in given.code
    _, report = fusionpass.rewrite(given, operands((4, 8)))
    assert len(report.rewrites) == 1 and model.seen == 0


def block():
    return torch.fx.symbolic_trace(Block().to(DEVICE))


def test_hooks_run_and_belong_to_the_copy():
    given, (x,) = block(), operands((4, 8))
    seen = []
    given.register_full_backward_hook(lambda module, *_: seen.append(("backward", module)))
    given.register_full_backward_pre_hook(lambda module, *_: seen.append(("backward pre", module)))
    given.register_forward_hook(lambda module, *_: seen.append(("forward", module)), with_kwargs=True, always_call=True)
    given.register_forward_pre_hook(lambda module, *_: seen.append(("forward pre", module)))
    given.register_state_dict_post_hook(lambda module, *_: seen.append(("state dict", module)))
    given.register_load_state_dict_pre_hook(lambda module, *_: seen.append(("load", module)))
    after, report = fusionpass.rewrite(given, [x])
    assert len(report.rewrites) == 1
    after(x.clone().requires_grad_()).sum().backward()
    after.load_state_dict(after.state_dict())
    names = ["forward pre", "forward", "backward pre", "backward", "state dict", "load"]
    assert seen == [(name, after) for name in names]
    after.register_forward_hook(lambda *_: seen.append("later"))
    seen.clear()
    given(x)
    assert [name for name, _ in seen] == ["forward pre", "forward"]


class Noted(torch.fx.GraphModule):
    """A graph module of one's own, which takes more to be built than torch.fx gives."""

    def __init__(self, root, graph, note):
        super().__init__(root, graph, "Noted")
        self.note = note

    def noted(self):
        return self.note


def test_what_the_graph_does_not_use_is_kept():
    model = Block().to(DEVICE)
    given = Noted(model, torch.fx.Tracer().trace(model), {"kept": 1})
    given.register_buffer("unused", torch.ones(2))
    given.register_buffer("passing", torch.ones(2), persistent=False)
    given.extra, given.frozen = torch.nn.Linear(2, 2), torch.nn.Parameter(torch.ones(1))
    given.meta["mine"] = 1
    given.training = False
    after, _ = fusionpass.rewrite(given, operands((4, 8)))
    assert isinstance(after, Noted) and after.noted() is given.note and type(after).__name__ == type(given).__name__
    for names in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(after, names)()), dict(getattr(given, names)())
        assert ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in ours)
    assert after.state_dict().keys() == given.state_dict().keys() and "unused" in after.state_dict()
    assert after.extra is given.extra and after.meta == given.meta and after.training is False
    after.register_buffer("new", torch.ones(1))
    after.meta["new"] = 1
    assert not hasattr(given, "new") and "new" not in given.meta


def test_children_keep_what_they_have():
    given, (x,) = (
        make_fx(lambda x: torch.cond(x.sum() > 0, formula, torch.sin, (x,)))(*operands((4, 8))),
        operands((4, 8))[0:1],
    )
    child = given.true_graph_0
    child.note, child.training = "kept", False
    child.register_buffer("unused", torch.ones(2))
    after, report = fusionpass.rewrite(given)
    assert len(report.rewrites) == 1 and after.true_graph_0 is not child
    assert after.true_graph_0.note == "kept" and after.true_graph_0.unused is child.unused
    assert after.true_graph_0.training is False and after.training is given.training
    torch.testing.assert_close(after(x), given(x))


def formula(x):
    return x + S(x) * x.cos()


def test_pieces_of_a_split_graph_stay_as_they_are():
    model = torch.nn.Sequential(Block(), Block()).to(DEVICE)
    graph = torch.fx.symbolic_trace(model)
    half = {node: index * 2 // len(graph.graph.nodes) for index, node in enumerate(graph.graph.nodes)}
    given = split_module(graph, None, half.__getitem__)
    codes = {name: child.code for name, child in given.named_children()}
    after, report = fusionpass.rewrite(given, operands((4, 8)))
    assert len(report.rewrites) == 2
    assert {name: child.code for name, child in given.named_children()} == codes
    assert all("val" not in node.meta for child in given.children() for node in child.graph.nodes)


def test_a_graph_that_is_not_what_runs_is_refused():
    given = block()
    given.forward = lambda x: x
    with pytest.raises(ValueError, match="forward was replaced on the instance"):
        fusionpass.rewrite(given, operands((4, 8)))
