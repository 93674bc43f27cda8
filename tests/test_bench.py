"""`fusionpass bench`: what it refuses, its help, on a GPU a small real run, and the saved runs."""

import json
import sys
from pathlib import Path

import bench_helpers
import pytest
from bench_helpers import CUDA, FORWARD, a_run

from fusionpass.bench.cases import HIDDEN, TOKENS, bytes_moved, grid
from fusionpass.bench.results import Run
from fusionpass.cli import main

bench = bench_helpers.bench
refused = bench_helpers.refused

BAD = {  # told before a GPU is asked for
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
