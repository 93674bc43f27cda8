"""Past Dynamo's recompile limit: instances that differ are fused all the same, and what is not fused is said."""

import gc
import logging
import weakref

import pytest
import torch
from programs import DEVICE, Block, operands

import fusionpass
from fusionpass.private import _debug_get_cache_entry_list

S = torch.sigmoid
LIMIT = 4  # Dynamo's is 8


@pytest.fixture(autouse=True)
def limited():
    """A lower limit, and not Dynamo's own warning at it; ours are what is tested."""
    log = logging.getLogger("torch._dynamo")
    before = log.level
    log.setLevel(logging.ERROR)
    with torch._dynamo.config.patch(recompile_limit=LIMIT):
        yield
    log.setLevel(before)


@pytest.fixture
def said(caplog):
    return lambda: [r.getMessage() for r in caplog.records if r.name == "fusionpass"]


class Layer(Block):
    """Differs by an attribute that Dynamo guards."""

    def __init__(self, index):
        super().__init__()
        self.index = index

    def forward(self, x):
        return (x + S(self.gate(x)) * x.tanh()) / self.index


class Equal(Layer):
    def forward(self, x):
        return x + S(self.gate(x)) * x.tanh()


class Stack(torch.nn.Module):
    def __init__(self, layer, count):
        super().__init__()
        self.layers = torch.nn.ModuleList(layer(i + 1) for i in range(count))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def fused_class(base, count, **options):
    """The stack with a fused class, and one of the same parameters as it was written."""
    Fused = fusionpass.fuse(type("Fused", (base,), {"forward": base.forward}), verify=False, **options)
    return Stack(Fused, count).to(DEVICE), base


def fused_instances(base, count, **options):
    stack = Stack(base, count).to(DEVICE)
    for layer in stack.layers:
        fusionpass.fuse(layer, verify=False, **options)
    return stack, base


def fused_function(base, count, **options):
    """A helper that takes the module first."""
    forward = fusionpass.fuse(base.forward, verify=False, **options)
    Calls = type("Calls", (base,), {"forward": lambda self, x: forward(self, x)})
    return Stack(Calls, count).to(DEVICE), base


WAYS = {"class": fused_class, "instances": fused_instances, "function": fused_function}


def as_written(stack, base, x):
    for layer in stack.layers:
        x = base.forward(layer, x)
    return x


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_instance_is_fused(way, said):
    stack, base = way(Layer, LIMIT + 2, strict=True)
    (x,) = operands((4, 8))
    with torch.no_grad(), fusionpass.collect() as report:
        got = stack(x)
        again = stack(x)
        other = stack(x[:3])
    assert report.executed == 3 * (LIMIT + 2)
    want = as_written(stack, base, x)
    for result, expected in ((got, want), (again, want), (other, want[:3])):
        torch.testing.assert_close(result, expected)
    (message,) = said()
    assert f"was compiled {LIMIT} times" in message and "fuse the module inside" in message


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_equal_instances_share_one(way, said):
    stack, _ = way(Equal, LIMIT + 2, strict=True)
    (x,) = operands((4, 8))
    with torch.no_grad(), fusionpass.collect() as report:
        stack(x)
    assert len(report.graphs) == 1 and report.executed == LIMIT + 2
    assert said() == []


def test_what_is_compiled_serves_past_the_limit():
    """Layers of two kinds, and kinds of calls up to the limit: no layer is compiled that an earlier one served."""

    class Kind(Layer):
        def __init__(self, index):
            super().__init__(index % 2 + 1)

    stack, _ = fused_class(Kind, 4, strict=True)
    xs = [operands((rows, 8))[0] for rows in (2, 3)]
    with torch.no_grad(), torch._dynamo.config.patch(automatic_dynamic_shapes=False), fusionpass.collect() as report:
        for x in xs * 2:
            stack(x)
    assert len(report.graphs) == LIMIT == 2 * len(xs)
    assert report.executed == 4 * 2 * len(xs)


def test_training_of_instances_past_the_limit():
    stack, base = fused_class(Layer, LIMIT + 2, strict=True)
    (x,) = operands((4, 8))
    stack(x).sum().backward()
    got = [parameter.grad.clone() for parameter in stack.parameters()]
    stack.zero_grad()
    as_written(stack, base, x).sum().backward()
    for gradient, parameter in zip(got, stack.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_a_code_of_ones_own_goes_with_its_instance():
    Fused = fusionpass.fuse(type("Fused", (Layer,), {"forward": Layer.forward}), verify=False)
    (x,) = operands((4, 8))
    layers = [Fused(i).to(DEVICE) for i in range(LIMIT + 2)]
    with torch.no_grad():
        for layer in layers:
            layer(x)
    gone = [weakref.ref(layer) for layer in layers]
    del layers, layer
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)


def test_a_reset_starts_afresh():
    stack, _ = fused_class(Layer, LIMIT + 2, strict=True)
    (x,) = operands((4, 8))
    for _ in range(2):
        with torch.no_grad(), fusionpass.collect() as report:
            stack(x)
        assert len(report.rewrites) == report.executed == LIMIT + 2
        torch._dynamo.reset()


def test_others_keep_their_limit():
    """The configuration and the count of a function that others compile stay as they are."""
    stack, base = fused_class(Layer, LIMIT + 2)
    (x,) = operands((4, 8))
    with torch.no_grad():
        stack(x)
    assert torch._dynamo.config.recompile_limit == LIMIT
    assert len(_debug_get_cache_entry_list(base.forward.__code__)) == LIMIT


# ---- where it is not fused


def flagged(x, flag):
    return (x + S(x) * x.tanh()) * len(flag)


class Flagged(torch.nn.Module):
    def forward(self, x, flag):
        return flagged(x, flag)


LIMITED = {
    "function": lambda **options: fusionpass.fuse(lambda x, flag: flagged(x, flag), verify=False, **options),
    "instance": lambda **options: fusionpass.fuse(Flagged(), verify=False, **options),
    "class": lambda **options: fusionpass.fuse(
        type("F", (Flagged,), {"forward": Flagged.forward}), verify=False, **options
    )(),
}


def flags():
    return ["x" * (i + 1) for i in range(LIMIT + 3)]


@pytest.mark.parametrize("make", LIMITED.values(), ids=LIMITED)
def test_the_limit_is_said_once(make, said):
    fused = make()
    (x,) = operands((4, 8))
    for flag in flags():
        torch.testing.assert_close(fused(x, flag), flagged(x, flag))
    (message,) = said()
    assert f"was compiled {LIMIT} times, and torch._dynamo.config.recompile_limit is {LIMIT}" in message


@pytest.mark.parametrize("make", LIMITED.values(), ids=LIMITED)
def test_strict_raises_past_the_limit_and_for_no_other_call(make):
    fused = make(strict=True)
    (x,) = operands((4, 8))
    for _ in range(2):
        for i, flag in enumerate(flags()):
            if i < LIMIT:
                torch.testing.assert_close(fused(x, flag), flagged(x, flag))
            else:
                with pytest.raises(fusionpass.NothingRewritten, match=f"was compiled {LIMIT} times"):
                    fused(x, flag)


def test_a_new_instance_of_a_function_at_its_limit_is_fused():
    first, second = (fusionpass.fuse(Flagged(), strict=True) for _ in range(2))
    (x,) = operands((4, 8))
    for flag in flags()[:LIMIT]:
        first(x, flag)
    with fusionpass.collect() as report:
        torch.testing.assert_close(second(x, "y" * 20), flagged(x, "y" * 20))
    assert report.executed == 1


def test_the_limit_of_all_compilations_is_named():
    fused = fusionpass.fuse(lambda x, flag: flagged(x, flag), strict=True)
    (x,) = operands((4, 8))
    with torch._dynamo.config.patch(accumulated_recompile_limit=2):
        fused(x, "a"), fused(x, "aa")
        with pytest.raises(fusionpass.NothingRewritten, match="config.accumulated_recompile_limit is 2"):
            fused(x, "aaa")


def test_a_call_at_the_limit_without_a_tensor_operation():
    """It is not the limit that keeps it from being fused."""

    def early(x, flag):
        if flag == "no":
            return x, x[:0].shape
        return flagged(x, flag)

    fused = fusionpass.fuse(early)
    (x,) = operands((4, 8))
    for flag in flags()[: LIMIT - 1]:
        fused(x, flag)
    assert fused(x, "no")[0] is x


def test_the_report_of_a_call_past_the_limit_says_why():
    fused = fusionpass.fuse(lambda x, flag: flagged(x, flag))
    (x,) = operands((4, 8))
    for flag in flags():
        fused(x, flag)
    with fusionpass.collect() as report:
        fused(x, flags()[-1])
    assert "past Dynamo's limit" in report.why_nothing()
