"""What `fusionpass bench` makes of its times: saved runs, ratios, the comparison, tables and plots."""

import dataclasses
import re

import bench_helpers
import pytest
from bench_helpers import CUDA, FORWARD, a_run, host_cost, measurement, timing

from fusionpass.bench.check import compare
from fusionpass.bench.results import Measurement, Ratio, Run, Timing
from fusionpass.bench.table import run_text

save = bench_helpers.save
bench = bench_helpers.bench
refused = bench_helpers.refused


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
