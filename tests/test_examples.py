"""The examples run as they stand, and stay short."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXPECTED = {
    "decorator.py": "1 rewritten (1 with gate_projection)",
    "backend_qwen3_next.py": "4 rewritten (4 with finalize, 4 with gate_projection, 4 with residual, 4 with rms_norm)",
    "hold_the_count.py": "3 of 3 blocks are fused",
    "own_rule.py": "1 rewritten, 0 near misses, 1 graph",
}


def test_every_example_is_expected():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_example(name):
    path = ROOT / "examples" / name
    if "transformers" in path.read_text():
        pytest.importorskip("transformers")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert EXPECTED[name] in done.stdout
    assert len(path.read_text().splitlines()) < 60
