"""What the inner compiler is called with: Inductor's settings of a mode, of the user, and of the graph."""

import pytest
import torch
import torch.nn.functional as F
from programs import DEVICE, operands

import fusionpass
from fusionpass.entry import inner_compiler
from fusionpass.entry.inner_compiler import inductor_settings, tunes

S = torch.sigmoid


def block(x, up, weight):
    return x + S(F.linear(x, weight)) * (x @ up)


def plain(x, up, weight):
    return x @ up + weight


def of_sequences(function):
    def mixed(x, up, weight):
        return function(F.conv1d(x.view(4, 1, 8), up[:1, :3].view(1, 1, 3), padding=1).view(4, 8), up, weight)

    return mixed


class Layer(torch.nn.Module):
    """A convolution as models hold it: its weight's name reaches the graph as well."""

    def __init__(self):
        super().__init__()
        self.conv1d = torch.nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x, up, weight):
        return block(self.conv1d(x.view(4, 1, 8)).view(4, 8), up, weight)


def of_images(function):
    def mixed(x, up, weight):
        return function(F.conv2d(x.view(4, 1, 1, 8), up[:1, :1].view(1, 1, 1, 1)).view(4, 8), up, weight)

    return mixed


KEPT = {"layout_optimization": False}
GRAPHS = "triton.cudagraphs"
# name -> program, options, what Inductor is told
CALLS = {
    "no convolution": (block, {}, {}),
    "1-D convolutions": (of_sequences(block), {}, KEPT),
    "a layer's": (Layer().to(DEVICE).requires_grad_(False), {}, KEPT),
    "convolutions of images": (of_images(block), {}, {}),
    "both": (of_images(of_sequences(block)), {}, {}),
    "nothing rewritten": (of_sequences(plain), {}, {}),
    "the user's own choice": (
        of_sequences(block),
        {"inductor": {"layout_optimization": True}},
        {"layout_optimization": True},
    ),
    "a mode": (block, {"mode": "reduce-overhead"}, {GRAPHS: True}),
    "a mode and a setting": (
        of_sequences(block),
        {"mode": "reduce-overhead", "inductor": {"max_autotune": True}},
        {GRAPHS: True, "max_autotune": True, **KEPT},
    ),
    "a setting over the mode's": (block, {"mode": "reduce-overhead", "inductor": {GRAPHS: False}}, {GRAPHS: False}),
}


@pytest.mark.parametrize(("function", "options", "told"), CALLS.values(), ids=CALLS)
def test_what_inductor_is_told(function, options, told, monkeypatch):
    calls = []

    def inductor(graph_module, example_inputs, config_patches=None):
        calls.append(config_patches or {})
        return graph_module

    monkeypatch.setattr(inner_compiler, "compiler_of", lambda options: inductor)
    args = operands((4, 8), (8, 8), (1, 8))
    want = function(*args)
    fused = fusionpass.fuse(function, inner="inductor", **options)
    torch.testing.assert_close(fused(*args), want)
    assert calls == [told]


@pytest.mark.parametrize("mode", [None, "max-autotune", "max-autotune-no-cudagraphs", "reduce-overhead"])
def test_modes_that_tune_are_known(mode):
    from fusionpass.options import Options

    options = Options.from_user({"inner": "inductor", "mode": mode})
    assert tunes(inductor_settings(options)) == (mode is not None and mode.startswith("max-autotune"))
    given = Options.from_user({"inner": "inductor", "inductor": {"coordinate_descent_tuning": True}})
    assert tunes(inductor_settings(given))


def test_equal_options_are_one_backend():
    """Dynamo guards on the backend: layers fused apart with equal settings share one compile."""
    from fusionpass.entry.backend import Backend
    from fusionpass.options import Options

    make = lambda **settings: Backend(Options.from_user({"inner": "inductor", "inductor": settings}))  # noqa: E731
    assert make(max_autotune=True) == make(max_autotune=True) != make(max_autotune=False)
    assert hash(make(max_autotune=True)) == hash(make(max_autotune=False))
