"""Inductor's and AOTAutograd's caches across processes: a warm one is hit and reports the same sites; a change is a miss."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

PROGRAM = """
import json, sys
import torch
import torch.nn.functional as F
import fusionpass
from torch._dynamo.utils import counters

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
options = json.loads(sys.argv[1])

def layer(x, up, down, gate, residual, norm):
    a, b = x @ up, (x @ down).tanh() @ up
    total = residual + (a + torch.sigmoid(F.linear(x, gate)) * b)
    return total, F.rms_norm(total, (64,), norm, 1e-6)

torch.manual_seed(0)
shapes = (8, 64), (64, 64), (64, 64), (1, 64), (8, 64), (64,)
args = [torch.randn(shape).to(DEVICE, torch.bfloat16) for shape in shapes]
with torch.no_grad(), fusionpass.collect() as report:
    got = torch.compile(layer, backend="fusionpass", options=options)(*args)
print(json.dumps({
    "sites": [site.to_dict() for site in report.rewrites],
    "fx hits": counters["inductor"]["fxgraph_cache_hit"],
    "fx misses": counters["inductor"]["fxgraph_cache_miss"],
    "aot hits": counters["aot_autograd"]["autograd_cache_hit"],
    "aot misses": counters["aot_autograd"]["autograd_cache_miss"],
    "sum": float(got[0].double().sum()),
}))
"""
HIT = {"fx hits": 0, "fx misses": 0, "aot hits": 1, "aot misses": 0}  # AOTAutograd's entry holds Inductor's
MISS = {"fx hits": 0, "fx misses": 1, "aot hits": 0, "aot misses": 1}


def ran(cache: Path, *, package: Path | None = None, **options) -> dict:
    """PROGRAM in a process of its own, without Triton's interpreter, as users run it."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    if package is not None:
        environment["PYTHONPATH"] = str(package)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(options)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=cache,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def counts(found: dict) -> dict:
    return {name: found[name] for name in HIT}


def test_a_second_process_hits_and_reports_the_same(tmp_path):
    cold, warm = ran(tmp_path), ran(tmp_path)
    assert counts(cold) == MISS
    assert counts(warm) in (HIT, {**HIT, "fx hits": 1})
    assert cold["sites"] == warm["sites"] and len(warm["sites"]) == 1
    assert cold["sum"] == warm["sum"]
    assert counts(ran(tmp_path, numerics="eager")) == MISS
    assert counts(ran(tmp_path, rules=["gated_add"], profitable_only=False)) == MISS


# file, text and its change: the kernel, or the expression that Inductor is given on a CPU
CHANGE = {
    True: (
        "moe_combine_kernel.py",
        "    y += sigmoid(logit, PRECISE, INTERPRETED)",
        "    y += 2 * sigmoid(logit, PRECISE, INTERPRETED)",
    ),
    False: ("moe_combine_aten.py", "shared = torch.sigmoid(", "shared = 2 * torch.sigmoid("),
}


def test_a_changed_kernel_is_a_miss(tmp_path):
    root, copied, cache = Path(__file__).parents[1], tmp_path / "package", tmp_path / "cache"
    cache.mkdir()
    for folder in ("fusionpass", "kernels"):
        shutil.copytree(root / folder, copied / folder, symlinks=True)
    (copied / "pyproject.toml").touch()
    cold = ran(cache, package=copied)
    assert counts(cold) == MISS
    assert counts(ran(cache, package=copied)) in (HIT, {**HIT, "fx hits": 1})
    name, before, after = CHANGE[torch.cuda.is_available()]
    kernel = copied / "kernels" / name
    assert before in kernel.read_text()
    kernel.write_text(kernel.read_text().replace(before, after))
    changed = ran(cache, package=copied)
    assert counts(changed) == MISS
    assert changed["sum"] != cold["sum"]
