"""`fusionpass bench`: what it refuses, the grid and its bytes, saved runs, the comparison, and on a GPU a small real run."""

import dataclasses
import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from test_cli import Terminal

from fusionpass.bench.cases import HIDDEN, OPS, TOKENS, Case, bytes_moved, draw, grid
from fusionpass.bench.check import compare
from fusionpass.bench.results import HostCost, Measurement, Ratio, Run, Timing
from fusionpass.bench.sides import Side, as_tuple, calls_of, ensure_right, errors, truth
from fusionpass.bench.table import run_text
from fusionpass.bench.timing import CHUNK, MAX_SETS, call_count, host_times, interleaved, set_count
from fusionpass.cli import main
from fusionpass.cli import progress as cli_progress

CUDA = torch.cuda.is_available()
FORWARD = ("gated_add", "gate_projected_add")


def timing(us, spread=0.01):
    return Timing(us, spread)


def measurement(op="gate_projected_add", tokens=32, hidden=4096, **sides):
    times = {"eager": timing(12.0), "compile": timing(8.0), "tuned": timing(7.0), "here": timing(4.0)}
    return Measurement(op, tokens, hidden, "bf16", 1_000_000, {**times, **sides})


def a_run(*measurements, cpu=()):
    return Run(
        device="a GPU",
        torch="2.11.0",
        triton="3.6.0",
        fusionpass="0.1.0",
        copy_gbps=2500.0,  # so 1,000,000 bytes take 0.4 us
        copy_spread_gbps=2.5,
        rounds=7,
        sets=None,
        measurements=list(measurements or [measurement()]),
        cpu=list(cpu),
    )


def host_cost(here=40.0, spread=0.5):
    sides = {"eager": Timing(50.0, spread), "compile": Timing(30.0, spread), "here": Timing(here, spread)}
    return HostCost("gated_add", 1, 2048, "bf16", {**sides, "rewritten": Timing(here + 2, spread)})


@pytest.fixture
def save(tmp_path):
    """`save(run, name)` gives the path of the run's file."""

    def call(run, name="run.json"):
        path = tmp_path / name
        path.write_text(run.to_json())
        return str(path)

    return call


@pytest.fixture
def bench(capsys):
    """`bench(*words)` gives exit code, standard output and standard error."""

    def call(*words):
        status = main(["bench", *map(str, words)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def refused(bench):
    """`refused(*words)` gives the one line of standard error that goes with exit code 2."""

    def call(*words):
        status, out, err = bench(*words)
        assert (status, out) == (2, ""), err
        assert err.startswith("fusionpass bench: ") and err.count("\n") == 1 and err.endswith("\n")
        return err

    return call


# Bad input, told before a GPU is asked for

BAD = {
    "unknown op": (["--op", "gated_ad"], "--op 'gated_ad' is unknown: allowed are gated_add, gate_projected_add, "),
    "one of two ops": (["--op", "gated_add,nope"], "'nope'"),
    "no op": (["--op", ","], "',' names no op"),
    "tokens": (["--tokens", "1,x"], "'1,x' is not a list of whole numbers from 1 up, such as 1,32,256"),
    "no tokens": (["--tokens", "0"], "'0' is not a list"),
    "hidden": (["--hidden", "-4"], "--hidden"),
    "dtype": (["--dtype", "int8"], "'int8'"),
    "one round": (["--rounds", "1"], "'1' is not a whole number from 2 up"),
    "format": (["--format", "yaml"], "'yaml'"),
    "plain tolerance": (["--tolerance", "5"], "'5' is neither a percentage such as 5% nor a fraction below 1"),
    "tolerance": (["--tolerance", "much"], "'much'"),
    "negative tolerance": (["--tolerance=-5%"], "'-5%'"),
    "tolerance that is none": (["--tolerance", "nan"], "'nan'"),
    "tolerance of nothing": (["--tolerance", "5%"], "no effect without --check"),
    "plot suffix": (["--plot", "run.gif"], "no suffix of .png, .svg, .pdf"),
    "no folder": (["--json", "no/such/run.json"], "--json 'no/such/run.json' cannot be written: there is no folder"),
    "a folder": (["--json", "."], "it is a folder"),
    "no baseline": (["--check", "no_such.json"], "--check 'no_such.json' cannot be read: No such file"),
    "no saved run": (["--from", "no_such.json"], "--from 'no_such.json' cannot be read: No such file"),
    "grid of a saved run": (["--from", "x.json", "--tokens", "1"], "--tokens has no effect with --from"),
    "sides of a saved run": (["--from", "x.json", "--no-tuned"], "--no-tuned has no effect with --from"),
}


@pytest.mark.parametrize("words, expected", BAD.values(), ids=BAD)
def test_bad_input(refused, words, expected):
    if words[0] == "--plot":
        pytest.importorskip("matplotlib")
    assert expected in refused(*words)


def _without(name):
    def change(fields):
        del fields[name]

    return change


def _with(name, value):
    def change(fields):
        fields[name] = value

    return change


def _in_measurement(change):
    return lambda fields: change(fields["measurements"][0])


def _in_here(change):
    return lambda fields: change(fields["measurements"][0]["sides"]["here"])


FOREIGN = {
    "another format": (_with("format", "pytest-benchmark"), "its 'format' is not 'fusionpass bench'"),
    "another version": (_with("version", 2), "it has version 2 of the format, this fusionpass reads 1"),
    "field missing": (_without("copy_gbps"), "the run lacks 'copy_gbps'"),
    "field of another type": (_with("device", 3), "the run has 'device' of type int"),
    "no bandwidth": (_with("copy_gbps", 0), "the run has 'copy_gbps' 0"),
    "nothing measured": (_with("measurements", []), "the run has no measurements"),
    "measurements of another type": (_with("measurements", {}), "'measurements' of type dict"),
    "unknown op": (_in_measurement(_with("op", "x")), "measurements[0] has the unknown op 'x'"),
    "unknown dtype": (_in_measurement(_with("dtype", "x")), "measurements[0] has the unknown dtype 'x'"),
    "boolean tokens": (_in_measurement(_with("tokens", True)), "measurements[0] has 'tokens' of type bool"),
    "no here": (_in_measurement(_with("sides", {})), "measurements[0] lacks the side 'eager'"),
    "no time": (_in_here(_with("median_us", 0.0)), "side 'here', has 'median_us' 0.0, which is out of range"),
    "no number": (_in_here(_with("median_us", float("nan"))), "'median_us' nan"),
    "negative spread": (_in_here(_with("spread_us", -1)), "'spread_us' -1"),
}


@pytest.mark.parametrize("change, expected", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file(refused, tmp_path, change, expected):
    fields = json.loads(a_run().to_json())
    change(fields)
    path = tmp_path / "foreign.json"
    path.write_text(json.dumps(fields))
    for option in ("--check", "--from"):
        line = refused(option, path)
        assert f"{option} '{path}' cannot be used: " in line and expected in line


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe\x00"], ids=["broken", "list", "bytes"])
def test_a_file_of_anything(refused, tmp_path, content):
    path = tmp_path / "any.json"
    path.write_bytes(content)
    assert "give a file that fusionpass bench --json has written" in refused("--from", path)


def test_matplotlib_missing(refused, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert 'pip install "fusionpass[plot]"' in refused("--plot", tmp_path / "run.png")


@pytest.mark.skipif(CUDA, reason="needs a machine without CUDA")
@pytest.mark.parametrize("words", [[], ["--tokens", "1"]], ids=["default", "grid"])
def test_no_gpu(refused, words):
    line = refused(*words)
    assert "no CUDA GPU here" in line and "bench measures kernels on one" in line and "--from RUN.json" in line


def test_help_teaches(capsys):
    assert main(["bench", "--help"]) == 0
    out = capsys.readouterr().out
    assert "examples:" in out and "exit codes:" in out
    assert "an unknown name lists them all" in " ".join(out.split())
    assert ",".join(map(str, TOKENS)) in out and ",".join(map(str, HIDDEN)) in out


# The grid, its bytes, its operands

BYTES = {  # at T, H and two bytes each; K = H
    "gated_add": lambda t, h: (3 * t * h + t) * 2,
    "gate_projected_add": lambda t, h: (t * (3 * h + h) + h) * 2,
    "moe_combine": lambda t, h: (6 * t * h + 2 * h) * 2,
    "moe_combine_top_10": lambda t, h: (15 * t * h + 2 * h + 10 * t * (1 + 4)) * 2,
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
    assert len(cases) == len(set(cases)) == 4 * 7 * 3 + 2 * 3 * 3
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


# Sides and their check


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
    results = 2 if op.startswith("moe_combine") else 1  # the sum, the normed sum
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


# Timing

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


# Results


def test_json_round_trip():
    run = a_run(measurement(), measurement("gated_add", 1, add=timing(1.0)), cpu=[host_cost()])
    again = Run.from_json(run.to_json())
    assert again == run
    assert isinstance(again.measurements[0].sides["here"], Timing)


def test_ratios_and_limit():
    run = a_run()
    (entry,) = run.measurements
    assert run.limit(entry).median_us == pytest.approx(0.4)
    assert run.limit(entry).spread_us == pytest.approx(0.0004)
    ratios = run.ratios(entry)
    assert {base: ratio.value for base, ratio in ratios.items()} == pytest.approx(
        {"eager": 4 / 12, "compile": 0.5, "tuned": 4 / 7, "limit": 10}
    )
    assert ratios["compile"].noise == pytest.approx(0.5 * (0.01 / 4 + 0.01 / 8))


@pytest.mark.parametrize(
    "here, base, tie",
    [
        (Timing(4.0, 0.1), Timing(4.15, 0.1), True),
        (Timing(4.0, 0.1), Timing(4.3, 0.1), False),
        (Timing(4.0, 0.0), Timing(4.0, 0.0), False),  # without a spread nothing says that they could differ
        (Timing(4.15, 0.1), Timing(4.0, 0.1), True),
    ],
)
def test_tie(here, base, tie):
    assert Ratio.of(here, base).tie is tie


# Comparison

KEPT, TWO_PERCENT = 0.05, 0.02
CHECKS = {
    # what the new run has: expected ratios that worsened
    "the same": (measurement(), KEPT, []),
    "better": (measurement(here=timing(3.0)), KEPT, []),
    "within the tolerance": (measurement(here=timing(4.16)), KEPT, []),
    "beyond it": (
        measurement(here=timing(5.0)),
        KEPT,
        ["here/eager", "here/compile", "here/tuned", "here/limit"],
    ),
    "beyond a smaller one": (
        measurement(here=timing(4.16)),
        TWO_PERCENT,
        ["here/eager", "here/compile", "here/tuned", "here/limit"],
    ),
    "beyond it, within the noise": (measurement(here=timing(5.0, 1.0)), KEPT, []),
    "the other side became faster": (measurement(compile=timing(6.0)), KEPT, ["here/compile"]),
    "a side left out": (
        Measurement("gate_projected_add", 32, 4096, "bf16", 1_000_000, {"eager": timing(12.0), "here": timing(5.0)}),
        KEPT,
        ["here/eager", "here/limit"],
    ),
    "another shape": (measurement(tokens=64, here=timing(9.0)), KEPT, []),
}


@pytest.mark.parametrize("new, tolerance, expected", CHECKS.values(), ids=CHECKS)
def test_check(new, tolerance, expected):
    found = compare(a_run(), a_run(new), tolerance)
    assert [worsened.name for worsened in found.worsened] == expected


def test_check_counts_what_both_have():
    new = a_run(measurement(), measurement(tokens=64), cpu=[host_cost()])
    found = compare(a_run(cpu=[host_cost()]), new, KEPT)
    assert (found.cases, found.ratios) == (2, 6)
    assert compare(a_run(), a_run(measurement(tokens=64)), KEPT).ratios == 0


@pytest.mark.parametrize("here, spread, worse", [(45.0, 0.5, True), (45.0, 3.0, False), (35.0, 0.5, False)])
def test_check_of_the_cpu(here, spread, worse):
    found = compare(a_run(cpu=[host_cost()]), a_run(cpu=[host_cost(here, spread)]), KEPT)
    names = ["CPU here/eager", "CPU rewritten/eager"] if worse else []
    assert [worsened.name for worsened in found.worsened] == names


def test_check_by_the_command(bench, save):
    old = save(a_run(measurement(compile=timing(16.0)), cpu=[host_cost()]), "old.json")
    new = save(a_run(measurement(compile=timing(12.9)), cpu=[host_cost()]), "new.json")
    status, out, err = bench("--from", new, "--check", old)
    assert status == 1 and "gate_projected_add" in out
    assert err == "gate_projected_add 32 x 4096: here/compile 0.25 -> 0.31 (+24%, allowed +5%)\n"
    status, _, err = bench("--from", new, "--check", old, "--tolerance", "0.25")
    assert (status, err) == (0, f"{old}: 6 ratios of 2 cases compared, none has worsened\n")
    status, _, err = bench("--from", new, "--check", old, "--tolerance", "25%")
    assert status == 0


def test_check_says_that_the_device_is_another(bench, save):
    old = save(dataclasses.replace(a_run(), device="another GPU"), "old.json")
    status, _, err = bench("--from", save(a_run()), "--check", old)
    assert status == 0
    assert err.startswith(f"note: {old} was measured on another GPU, this run on a GPU\n")


def test_check_refuses_a_run_of_other_operand_sets(refused, save):
    old = save(a_run(), "old.json")
    new = save(dataclasses.replace(a_run(), sets=4), "new.json")
    assert "was measured with no --sets, the run with --sets 4" in refused("--from", new, "--check", old)


def test_a_change_below_two_digits_shows_more_of_them(bench, save):
    old = save(a_run(measurement(here=timing(0.04, 0))), "old.json")
    new = save(a_run(measurement(here=timing(0.0406, 0))), "new.json")
    assert (
        "here/eager 0.0033 -> 0.0034 (+1.5%, allowed +0%)"
        in bench("--from", new, "--check", old, "--tolerance", "0")[2]
    )


NOTHING_IN_COMMON = {
    "saved run": lambda save: ["--from", save(a_run(measurement(tokens=64)), "new.json")],
    "grid": lambda save: ["--tokens", "1,64"],
    "op": lambda save: ["--op", "gated_add"],
    "dtype": lambda save: ["--dtype", "fp16"],
}


@pytest.mark.parametrize("words", NOTHING_IN_COMMON.values(), ids=NOTHING_IN_COMMON)
def test_nothing_in_common(refused, save, words):
    old = save(a_run(), "old.json")
    assert f"--check '{old}' has no op, shape and dtype in common" in refused(*words(save), "--check", old)


@pytest.mark.skipif(CUDA, reason="would measure")
@pytest.mark.parametrize("words", [[], ["--tokens", "32"], ["--op", "gate_projected_add"]], ids=" ".join)
def test_check_needs_a_gpu_once_the_grids_meet(refused, save, words):
    assert "no CUDA GPU here" in refused("--check", save(a_run()), *words)


# Tables and plots


def test_table(bench, save):
    tied = measurement(tokens=64, compile=Timing(4.05, 0.1), here=Timing(4.0, 0.1))
    run = a_run(measurement(), tied, measurement("gated_add", 1, add=timing(3.9, 0.2)), cpu=[host_cost()])
    status, out, err = bench("--from", save(run))
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == (
        "a GPU, bf16; a device copy moves 2500 GB/s; median of 7 rounds, up to 128 sets; "
        "torch 2.11.0, triton 3.6.0, fusionpass 0.1.0"
    )
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    head = "T H eager compile tuned here limit here/compile here/tuned here/limit".split()
    assert [*head, "here GB/s"] in rows
    assert "32 4096 12.0 8.00 7.00 4.00 ± 0.01 0.40 0.50 0.57 10.00 250" in _joined(rows)
    assert "64 4096 12.0 4.05 7.00 4.00 ± 0.10 0.40 ~0.99 0.57 10.00 250" in _joined(rows)
    assert "gated_add 1 2048 50.0 ± 0.5 30.0 ± 0.5 40.0 ± 0.5 42.0 ± 0.5" in _joined(rows)
    assert out.index("gated_add, GPU us per call") < out.index("gate_projected_add, GPU us per call")
    assert "~: a tie" in out and "add: one torch.add(a, b)" in out
    assert max(map(len, out.splitlines())) <= 125


def _joined(rows):
    return [" ".join(row) for row in rows]


def test_markdown(bench, save):
    lines = bench("--from", save(a_run()), "--format", "markdown")[1].splitlines()
    assert "`gate_projected_add`, GPU us per call" in lines
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert [len(row) for row in rows] == [11] * 3
    assert rows[0][0] == "T" and rows[2][5] == "4.00 ± 0.01"


def test_a_side_that_was_not_measured_has_no_column():
    entry = measurement()
    del entry.sides["tuned"]
    assert "tuned" not in run_text(a_run(entry), "table")


@pytest.mark.parametrize(
    "suffix, magic", [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")], ids=["png", "svg", "pdf"]
)
def test_plot(bench, save, tmp_path, suffix, magic):
    pytest.importorskip("matplotlib")
    entries = [measurement(op, t, h) for op in FORWARD for t in (1, 32) for h in (64, 128)]
    path = tmp_path / f"run{suffix}"
    status, out, err = bench("--from", save(a_run(*entries)), "--plot", path)
    assert (status, err) == (0, "")
    assert path.read_bytes().startswith(magic)


def test_json_of_a_saved_run(bench, save, tmp_path):
    run = a_run(cpu=[host_cost()])
    assert bench("--from", save(run), "--json", tmp_path / "copy.json")[0] == 0
    assert Run.from_json((tmp_path / "copy.json").read_text()) == run


# Progress


def test_progress_has_a_bar(monkeypatch):
    monkeypatch.setattr(cli_progress, "PERIOD_S", 0.01)
    monkeypatch.setattr(cli_progress, "PATIENCE_S", 0.0)
    stream = Terminal()
    with cli_progress.Progress(stream) as progress:
        progress.stage("gate_projected_add 32 x 4096: compiling")
        progress.fraction(21, 42)
        time.sleep(0.1)
    assert "gate_projected_add 32 x 4096: compiling ... [##########..........] 21/42 0 s" in stream.getvalue()


# On a GPU


@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
def test_a_small_run(bench, tmp_path):
    path = tmp_path / "run.json"
    words = ["--tokens", "1,32", "--hidden", "256", "--rounds", "3", "--json", path]
    status, out, err = bench("--op", "gated_add,gate_projected_add", *words)
    assert status == 0, err
    run = Run.from_json(path.read_text())
    assert [entry.case for entry in run.measurements] == grid(FORWARD, [1, 32], [256])
    for entry in run.measurements:
        expected = ["eager", "compile", "tuned", "here"] + ["add"] * (entry.op == "gated_add")
        assert sorted(entry.sides) == sorted(expected)
        assert all(time.median_us > 0 for time in entry.sides.values())
        assert entry.bytes == bytes_moved(entry.case)
    assert [(cost.op, cost.tokens) for cost in run.cpu] == [(op, 1) for op in FORWARD]
    for cost in run.cpu:
        assert sorted(cost.sides) == ["compile", "eager", "here", "rewritten"]
    assert run.rounds == 3 and run.copy_gbps > 0


@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
def test_a_small_run_of_the_backward_and_its_check(bench, tmp_path):
    path = tmp_path / "run.json"
    words = ["--tokens", "1,32", "--hidden", "256", "--rounds", "3", "--sets", "3", "--no-tuned", "--json", path]
    status, _, err = bench("--op", "gated_add_backward", "--op", "gate_projected_add_backward", *words)
    assert status == 0, err
    run = Run.from_json(path.read_text())
    assert len(run.measurements) == 4 and run.cpu == [] and run.sets == 3
    for entry in run.measurements:
        assert sorted(entry.sides) == ["compile", "eager", "here"]
        assert all(time.median_us > 0 for time in entry.sides.values())
    status, _, err = bench("--check", path, "--no-tuned", "--rounds", "3", "--tolerance", "1000%")
    assert status == 0, err
    assert err.endswith("12 ratios of 4 cases compared, none has worsened\n")


BASELINES = sorted((Path(__file__).parent / "baselines").glob("*.json"))


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_a_baseline_is_a_run_in_which_nothing_of_ours_is_slower_than_eager(path, capsys):
    run = Run.from_json(path.read_text())
    assert all(run.ratios(measurement)["eager"].value < 1 for measurement in run.measurements)
    assert main(["bench", "--from", str(path)]) == 0
    assert run.device in capsys.readouterr().out
