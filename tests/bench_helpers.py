"""Runs of `fusionpass bench` with chosen times, and the command as a function."""

import pytest
import torch

from fusionpass.bench.results import HostCost, Measurement, Run, Timing
from fusionpass.cli import main

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
