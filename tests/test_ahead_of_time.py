"""torch.export and AOTInductor: a rewritten program saves, loads and runs; its package calls no Python."""

import os
import subprocess
import sys
import zipfile

import pytest
import torch
from programs import DEVICE, operands
from torch._subclasses.fake_tensor import FakeTensorMode

import fusionpass
import fusionpass.inductor
from fusionpass.cli import main

S = torch.sigmoid


class Layer(torch.nn.Module):
    """Everything but the weighted sum, or the core alone."""

    def __init__(self, whole: bool):
        super().__init__()
        self.up, self.down = (torch.nn.Linear(64, 64, bias=False) for _ in range(2))
        self.gate, self.norm = torch.nn.Linear(64, 1, bias=False), torch.nn.RMSNorm(64)
        self.whole = whole

    def forward(self, x, residual):
        if not self.whole:
            return self.up(x) + S(x[:, :1]) * self.down(x)
        total = residual + (self.up(x) + S(self.gate(x)) * self.down(x))
        return total, self.norm(total)


STAGES = {True: ["gate_projection", "gated_add", "residual", "rms_norm"], False: ["gated_add"]}


def rewritten(whole: bool):
    torch.manual_seed(0)
    layer = Layer(whole).to(DEVICE, torch.bfloat16).eval()
    args = tuple(operands((8, 64), (8, 64), dtype=torch.bfloat16))
    with torch.no_grad():
        program, report = fusionpass.rewrite(torch.export.export(layer, args))
        want = layer(*args)
    assert [site.stages for site in report.rewrites] == [STAGES[whole]]
    return program, args, want if whole else (want,)


def alone(program: str, *arguments, **environment) -> str:
    """What a program prints in a process of its own, without Triton's interpreter."""
    environment = {**os.environ, **environment}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LOADED = """
import sys, torch, fusionpass
args, want = torch.load(sys.argv[2])
got = torch.export.load(sys.argv[1]).module()(*args)
for g, w in zip(got if isinstance(got, tuple) else (got,), want):
    torch.testing.assert_close(g, w, rtol=0.02, atol=0.02)
"""
COMPILED = """
import sys, torch, fusionpass
program = torch.export.load(sys.argv[1])
torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[2])
"""
PACKAGED = """
import sys
sys.modules["fusionpass"] = sys.modules["triton"] = None  # importing either raises
import torch
args, want = torch.load(sys.argv[2])
got = torch._inductor.aoti_load_package(sys.argv[1])(*args)
for g, w in zip(got if isinstance(got, (tuple, list)) else (got,), want):
    torch.testing.assert_close(g, w, rtol=0.02, atol=0.02)
"""


@pytest.mark.parametrize("whole", [True, False], ids=["region", "formula"])
def test_a_saved_program_runs_elsewhere_and_compiles_ahead_of_time(whole, tmp_path, capsys):
    program, args, want = rewritten(whole)
    saved, values, package = (tmp_path / name for name in ("program.pt2", "values.pt", "package.pt2"))
    torch.export.save(program, saved)
    torch.save((args, want), values)
    alone(LOADED, saved, values)
    if DEVICE == "cuda" and whole:
        with torch.no_grad(), pytest.raises(Exception, match="AOTInductor cannot package .*rules="):
            torch._inductor.aoti_compile_and_package(program, package_path=str(package))
        return

    alone(COMPILED, saved, package, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    alone(PACKAGED, package, values)
    with zipfile.ZipFile(package) as archive:
        held = b"".join(archive.read(name) for name in archive.namelist())
    assert b"fusionpass::" not in held  # how the package would call the op

    assert main(["report", str(package)]) == 2
    assert "package.pt2' is a package of AOTInductor" in capsys.readouterr().err


@pytest.mark.parametrize("op", ["gate_projected_add", "moe_combine"])
def test_a_package_for_a_gpu_is_refused(op, monkeypatch):
    """The kernels of these in a package crashed when it was called; told while compiling, with what to do instead."""
    monkeypatch.setattr(fusionpass.inductor, "_ahead_of_time", lambda: True)
    with (
        FakeTensorMode(),
        pytest.raises(RuntimeError, match=rf"cannot package fusionpass\.{op}.*rules=\['gated_add'\]"),
    ):
        a = torch.empty(4, 8, device="cuda")
        fusionpass.inductor._opened(None, getattr(torch.ops.fusionpass, op).default, (), (a, a))
