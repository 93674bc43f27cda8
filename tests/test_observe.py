"""What PyTorch's own tools see: logs, counters, the structured trace, passes switched off by name, provenance."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from programs import DEVICE, Block, abg
from torch._dynamo.utils import counters

import fusionpass

S = torch.sigmoid


def formula(a, b, g):
    return a + S(g) * b


PROGRAM = """
import torch
import fusionpass
a, b, g = torch.ones(4, 8), torch.ones(4, 8), torch.ones(4, 1)
torch.compile(lambda a, b, g: (a + torch.sigmoid(g) * b, a + 2 * torch.sigmoid(g) * b), backend="fusionpass",
              options={"inner": "eager"})(a, b, g)
"""


def ran(**environment: str) -> subprocess.CompletedProcess:
    """PROGRAM in a process of its own, since the logs are set up while torch is imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done


def test_torch_logs():
    quiet, loud = ran().stderr, ran(TORCH_LOGS="+fusionpass").stderr
    assert "gated_add" not in quiet
    assert "sigmoid, mul, add -> gated_add" in loud
    assert "[gated_add/scaled]" in loud


def test_structured_trace(tmp_path):
    """The artefact that tlparse shows: its line names it, its indented payload is JSON."""
    ran(TORCH_TRACE=str(tmp_path))
    (log,) = tmp_path.iterdir()
    lines = log.read_text().splitlines()
    (at,) = [i for i, line in enumerate(lines) if '"name": "fusionpass_report"' in line]
    head = json.loads(lines[at][lines[at].index("{") :])
    assert head["artifact"] == {"name": "fusionpass_report", "encoding": "json"}
    assert head["frame_id"] == 0 and head["has_payload"]
    payload = []
    for line in lines[at + 1 :]:
        if not line.startswith("\t"):
            break
        payload.append(line)
    found = json.loads("".join(payload))
    assert [site["replacement"] for site in found["rewrites"]] == ["gated_add"]
    assert [miss["code"] for miss in found["misses"]] == ["scaled"]


def test_counters():
    counters.clear()
    args = abg()
    fusionpass.fuse(lambda a, b, g: formula(a, b, g) + formula(a, b, 2 * g))(*args)
    fusionpass.fuse(lambda a, b, g: a + 2 * S(g) * b)(*args)
    assert dict(counters["fusionpass"]) == {"graphs": 2, "rewrites": 2, "misses": 1, "miss scaled": 1}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_switched_off_by_name(inner, caplog):
    args = abg()
    with torch._inductor.config.patch(disabled_passes="fusionpass"), caplog.at_level(logging.WARNING, "fusionpass"):
        fused = fusionpass.fuse(lambda *x: formula(*x), inner=inner)
        torch.testing.assert_close(fused(*args), formula(*args), rtol=0, atol=0)
    (record,) = [r for r in caplog.records if r.name == "fusionpass"]
    assert "disabled_passes" in record.getMessage()
    torch._dynamo.reset()
    assert fusionpass.explain(formula, inner=inner)(*args).rewrites


def test_the_bisector_is_asked(monkeypatch):
    """It counts the pass among Inductor's pre-grad ones, by its name, and may have it not run."""
    from torch._inductor.compiler_bisector import CompilerBisector

    asked = []

    def disable(backend, subsystem, debug_info=None):
        asked.append((backend, subsystem, debug_info()))
        return True

    monkeypatch.setattr(CompilerBisector, "disable_subsystem", disable)
    assert not fusionpass.explain(formula)(*abg()).rewrites
    assert asked == [("inductor", "pre_grad_passes", "fusionpass")]


def test_provenance_of_a_replacement():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block(x)

    seen = {}

    def inner(graph_module, example_inputs):
        (seen["node"],) = [n for n in graph_module.graph.nodes if "fusionpass" in str(n.target)]
        return graph_module

    torch.compile(Model().to(DEVICE), backend="fusionpass", options={"inner": inner})(torch.ones(4, 8, device=DEVICE))
    meta = seen["node"].meta
    assert "torch.sigmoid(self.gate(x)) * x.tanh()" in meta["stack_trace"]
    assert list(meta["nn_module_stack"].values())[-1][1].__name__ == "Block"
    assert meta["from_node"][0].name == "add" and meta["from_node"][0].pass_name == "fusionpass"
