"""What `fusionpass bench` measures: the grid and its bytes, the sides and their check, and how they are timed."""

import time

import pytest
import torch

from fusionpass.bench.cases import OPS, Case, bytes_moved, draw, grid
from fusionpass.bench.results import Timing
from fusionpass.bench.sides import Side, as_tuple, calls_of, ensure_right, errors, truth
from fusionpass.bench.timing import CHUNK, MAX_SETS, call_count, host_times, interleaved, set_count

BYTES = {  # at T, H and two bytes each; K = H
    "gated_add": lambda t, h: (3 * t * h + t) * 2,
    "gate_projected_add": lambda t, h: (t * (3 * h + h) + h) * 2,
    "moe_combine": lambda t, h: (6 * t * h + 2 * h) * 2,
    "moe_combine_top_10": lambda t, h: (15 * t * h + 2 * h + 10 * t * (1 + 4)) * 2,
    "finalize_top_8": lambda t, h: (11 * t * h + h + 8 * t * (1 + 4)) * 2,
    "finalize_top_8_batched": lambda t, h: (11 * t * h + h + 8 * t) * 2,
    "finalize_top_8_shared": lambda t, h: (12 * t * h + h + 8 * t * (1 + 4)) * 2,
    "gated_add_backward": lambda t, h: (3 * t * h + 2 * t) * 2,
    "gate_projected_add_backward": lambda t, h: (t * (3 * h + 2 * h + 1) + 2 * h) * 2,
}


@pytest.mark.parametrize("op", OPS)
def test_bytes(op):
    for case in grid([op]):
        assert bytes_moved(case) == BYTES[op](case.tokens, case.hidden)
    assert bytes_moved(Case(op, 3, 5, "fp32")) == 2 * BYTES[op](3, 5)


def test_default_grid():
    cases = grid()
    assert len(cases) == len(set(cases)) == 7 * 7 * 3 + 2 * 3 * 3
    assert {case.dtype for case in cases} == {"bf16"}
    assert min(case.tokens for case in cases if OPS[case.op].backward) == 256


def test_tokens_that_were_asked_for_go_for_the_backward_too():
    assert grid(["gated_add_backward"], [1, 32], [64]) == [
        Case("gated_add_backward", 1, 64, "bf16"),
        Case("gated_add_backward", 32, 64, "bf16"),
    ]


@pytest.mark.parametrize("op", OPS)
def test_operands(op):
    inputs, dy = draw(Case(op, 4, 256, "bf16"), torch.Generator().manual_seed(0))
    assert [tuple(t.shape) for t in inputs] == list(OPS[op].shapes(4, 256).values())
    assert all(t.requires_grad == OPS[op].backward and t.is_leaf for t in inputs)
    assert (dy is None) != OPS[op].backward
    if "weight" in OPS[op].shapes(4, 256):
        assert 0.5 < float(torch.nn.functional.linear(inputs[0], inputs[1]).detach().std()) < 2.0


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("tokens", [1, 9])
def test_here_and_eager_are_right(op, tokens):
    case = Case(op, tokens, 96, "bf16")
    generator = torch.Generator().manual_seed(tokens)
    sets = [draw(case, generator) for _ in range(2)]
    exact = truth(OPS[op].eager, sets[-1])
    outputs = {}
    for name in ("eager", "here"):
        calls = calls_of(getattr(OPS[op], name), sets)
        for _ in range(2):  # a backward may be called again
            outputs[name] = as_tuple(calls[-1]())
    results = 2 if op.startswith(("moe_combine", "finalize")) else 1  # the sum, the normed sum
    assert len(exact) == (len(sets[0].inputs) if OPS[op].backward else results)
    eager = errors(outputs["eager"], exact)
    assert max(eager) < 0.02
    here = Side("here", OPS[op].here, OPS[op].eager)
    ensure_right(case, here, errors(outputs["here"], exact), eager, outputs["here"])


WRONG = {
    "the gate left out": lambda a, gate, b: a + b,
    "one row unwritten": lambda a, gate, b: torch.cat([(a + torch.sigmoid(gate) * b)[:-1], torch.zeros_like(a[:1])]),
    "nan": lambda a, gate, b: torch.cat([(a + torch.sigmoid(gate) * b)[:-1], torch.full_like(a[:1], torch.nan)]),
}


@pytest.mark.parametrize("function", WRONG.values(), ids=WRONG)
def test_a_wrong_side_raises(function):
    case = Case("gated_add", 64, 32, "bf16")
    operands = draw(case, torch.Generator().manual_seed(0))
    exact = truth(OPS["gated_add"].eager, operands)
    eager = errors([OPS["gated_add"].eager(*operands.inputs)], exact)
    outputs = [function(*operands.inputs)]
    side = Side("compile", function, OPS["gated_add"].eager)
    with pytest.raises(RuntimeError, match="gated_add 64 x 32, side compile: the output has a relative error of"):
        ensure_right(case, side, errors(outputs, exact), eager, outputs)


MB = 2**20


@pytest.mark.parametrize(
    "read, size, free, expected",
    [
        pytest.param(8 * MB, 12 * MB, 80_000 * MB, 13, id="twice the cache"),
        pytest.param(400 * MB, 600 * MB, 80_000 * MB, 2, id="at least two"),
        pytest.param(100, 150, 80_000 * MB, MAX_SETS, id="at most 128"),
        pytest.param(8 * MB, 12 * MB, 240 * MB, 5, id="a quarter of the memory"),
        pytest.param(8 * MB, 12 * MB, 10 * MB, 2, id="at least two whatever the memory"),
    ],
)
def test_set_count(read, size, free, expected):
    assert set_count(None, read, size, 50 * MB, free) == expected


@pytest.mark.parametrize("wanted, expected", [(1, 1), (4, 4), (1000, 1000), (5000, 4096)])
def test_set_count_that_was_asked_for(wanted, expected):
    assert set_count(wanted, MB, MB, 50 * MB, 16 * 1024 * MB) == expected


@pytest.mark.parametrize("sets, calls", [(2, 32), (3, 33), (13, 39), (32, 32), (128, 128)])
def test_call_count(sets, calls):
    assert call_count(sets) == calls


def test_samples_alternate_and_the_first_round_does_not_count():
    order = []

    def sampler(name, values):
        values = iter(values)

        def sample():
            order.append(name)
            return next(values)

        return sample

    found = interleaved({"a": sampler("a", [99, 3, 1, 2]), "b": sampler("b", [99, 6, 6, 6])}, 3)
    assert order == ["a", "b"] * 4
    assert found == {"a": Timing(2, 1.0), "b": Timing(6, 0.0)}


def test_timing_leaves_outliers_out_of_the_spread():
    assert Timing.of([1, 2, 3, 4, 50], outliers=1) == Timing(3, 1.0)


def test_host_times_are_microseconds_per_call():
    calls = {"a": [0], "b": [0]}

    def wait():
        calls["a"][0] += 1
        until = time.perf_counter() + 20e-6
        while time.perf_counter() < until:
            pass

    def nothing():
        calls["b"][0] += 1

    waited = []
    found = host_times({"a": wait, "b": nothing}, lambda: waited.append(1), chunks=7)
    assert found["a"].median_us >= 20 and found["b"].median_us < 20
    assert calls["a"] == calls["b"] == [8 * CHUNK]
    assert len(waited) == 2 * 8 + 1
