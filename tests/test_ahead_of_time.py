"""torch.export and AOTInductor: a rewritten program saves, loads and runs; its package calls no Python."""

import os
import signal
import subprocess
import sys
import zipfile
from contextlib import nullcontext

import pytest
import torch
from programs import DEVICE, operands
from torch._subclasses.fake_tensor import FakeTensorMode

import fusionpass
import fusionpass.operators.in_inductor
from fusionpass.cli import main
from fusionpass.operators import gated_add

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


def exported(whole: bool, dynamic: bool):
    """(the program, inputs, what eager makes of them), the latter of other numbers of rows where these are dynamic."""
    torch.manual_seed(0)
    layer = Layer(whole).to(DEVICE, torch.bfloat16).eval()
    args = tuple(operands((8, 64), (8, 64), dtype=torch.bfloat16))
    shapes = ({0: torch.export.Dim.DYNAMIC},) * 2 if dynamic else None
    with torch.no_grad():
        program = torch.export.export(layer, args, dynamic_shapes=shapes)
        if dynamic:
            args = tuple(operands((21, 64), (21, 64), dtype=torch.bfloat16))
        want = layer(*args)
    return program, args, want if whole else (want,)


def ran(program: str, *arguments, **environment) -> subprocess.CompletedProcess:
    """A program in a process of its own, without Triton's interpreter."""
    environment = {**os.environ, **environment}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


def alone(program: str, *arguments, **environment) -> None:
    done = ran(program, *arguments, **environment)
    assert done.returncode == 0, done.stderr


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


CRASHED = -signal.SIGSEGV


CASES = {"any rows": (True, True), "formula": (False, False)}  # whole, dynamic
if DEVICE == "cuda":
    CASES["region"] = (True, False)


@pytest.mark.parametrize(("whole", "dynamic"), CASES.values(), ids=CASES)
def test_a_saved_program_runs_elsewhere_and_compiles_ahead_of_time(whole, dynamic, tmp_path, capsys):
    plain, args, want = exported(whole, dynamic)
    with torch.no_grad():
        program, report = fusionpass.rewrite(plain)
    assert [site.stages for site in report.rewrites] == [STAGES[whole]]
    saved, values, package = (tmp_path / name for name in ("program.pt2", "values.pt", "package.pt2"))
    torch.export.save(program, saved)
    torch.save((args, want), values)
    alone(LOADED, saved, values)

    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    alone(COMPILED, saved, package, **cache)
    done = ran(PACKAGED, package, values)
    if done.returncode == CRASHED:
        torch.export.save(plain, saved)
        alone(COMPILED, saved, package, **cache)
        if ran(PACKAGED, package, values).returncode == CRASHED:
            pytest.skip(f"packages crash here unrewritten too; their C++ compiler is {os.environ.get('CXX', 'g++')}")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(package) as archive:
        held = b"".join(archive.read(name) for name in archive.namelist())
    assert b"fusionpass::" not in held  # how the package would call the op
    assert (b"moe_combine_kernel" in held) == (whole and DEVICE == "cuda")

    assert main(["report", str(package)]) == 2
    assert "package.pt2' is a package of AOTInductor" in capsys.readouterr().err


def test_what_a_package_would_call_in_python_is_refused(monkeypatch):
    """With eager's roundings a GPU's kernel is no expression, and Inductor has no launch of it."""
    monkeypatch.setattr(fusionpass.operators.in_inductor, "_ahead_of_time", lambda: True)
    monkeypatch.setattr(fusionpass.operators.in_inductor, "interpreted", lambda: False)
    with FakeTensorMode(), pytest.raises(RuntimeError, match=r"cannot package this fusionpass\.gated_add.*numerics"):
        a = torch.empty(4, 8, device="cuda")
        options = {"numerics": "eager"}
        fusionpass.operators.in_inductor._opened(
            gated_add.under_inductor, nullcontext(), gated_add.OP.overload, (), (a, a, a), options
        )
