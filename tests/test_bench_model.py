"""`fusionpass bench TARGET`: what it measures and prints, and what it refuses. Its times are nobody's to assert."""

import json
from dataclasses import replace

import models
import pytest
import torch
from programs import DEVICE, abg

from fusionpass.bench import compiling, steps
from fusionpass.bench.compiling import CompileRun, CompileTime
from fusionpass.bench.steps import Cell, ModelRun, Side
from fusionpass.cli import main

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")


@pytest.fixture
def on_this_machine(monkeypatch):
    """Few steps, and stand-ins for a GPU's clock and profiler where there is none."""
    monkeypatch.setattr(steps, "STEPS", 3)
    if DEVICE == "cpu":
        monkeypatch.setattr(steps, "synchronize", lambda: None)
        monkeypatch.setattr(steps, "profiled", lambda call: (call(), (7, 0.25))[1])


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_next"])
def test_every_cell_is_measured(family, on_this_machine):
    """Each shape in each mode, without the pass and with it; every layer's site is counted, and none of it recompiles."""
    model, _ = models.build(family, dtype=torch.bfloat16)
    said = []
    cells = steps.measure(model, batches=(3,), prefills=(5,), rounds=2, modes=("eager",), stage=said.append)
    assert [(cell.mode, cell.batch, cell.tokens) for cell in cells] == [("eager", 3, 0), ("eager", 1, 5)]
    for cell in cells:
        assert cell.plain.ms > 0 and cell.fused.ms > 0
        assert (cell.plain.rewrites, cell.fused.rewrites) == (None, 2)
        assert cell.plain.share is None and 0 < cell.fused.share < 1
    assert any("decode, batch 3: compiling eager with fusionpass" in line for line in said)


def test_decoding_rewinds(on_this_machine):
    """Steps past the cache's end would write out of it: each sample starts at the first token again."""
    model, _ = models.build("qwen2_moe", dtype=torch.bfloat16)
    with torch.no_grad():
        call, rewind = steps.decode(model, 2)
        for _ in range(3):
            rewind()
            for _ in range(steps.STEPS + 1):
                output = call(model)
    assert output.past_key_values.get_seq_length() == steps.STEPS + 1


def run(plain=(2.0, 0.1), fused=(1.5, 0.1), tokens=0) -> ModelRun:
    sides = Side(*plain, 100, None, None), Side(*fused, 80, 4, 0.125)
    cell = Cell("default", 1 if tokens else 8, tokens, *sides)
    return ModelRun("qwen2_moe", 4, "H100", "2.11.0", 7, [cell])


TEXTS = {
    "decode": (run(), ["decode, batch 8", "default", "2.000 ± 0.100", "1.500 ± 0.100", " 0.750", "100", "80", "12.5%"]),
    "prefill": (run(tokens=2048), ["prefill 1 x 2048"]),
    "a tie": (run(fused=(1.9, 0.1)), ["~0.950"]),
    "slower": (run(fused=(2.4, 0.1)), [" 1.200"]),
    "experts": (replace(run(), experts="batched_mm"), ["qwen2_moe, 4 layers, batched_mm experts, H100"]),
    "head": (run(), ["qwen2_moe, 4 layers, H100, torch 2.11.0", "median of 7 rounds"]),
}


@pytest.mark.parametrize("style", ["table", "markdown"])
@pytest.mark.parametrize(("measured", "parts"), TEXTS.values(), ids=TEXTS)
def test_text(measured, parts, style):
    text = measured.text(style)
    assert all(part in text for part in parts), text


def test_json_has_every_number():
    (cell,) = json.loads(json.dumps(run().to_dict()))["cells"]
    assert cell["plain"] == {"ms": 2.0, "spread_ms": 0.1, "kernels": 100, "rewrites": None, "share": None}
    assert cell["fused"]["share"] == 0.125


def test_compile_times(monkeypatch):
    """Every mode but eager, with and without; the pass is timed, and is part of the whole."""

    class Block(torch.nn.Module):
        def forward(self, a, b, g):
            return a + torch.sigmoid(g) * b

    args, said = abg(), []
    monkeypatch.setattr(compiling, "decode", lambda model, batch: (lambda forward: forward(*args), lambda: None))
    (time,) = compiling.compile_times(Block(), batch=2, modes=("eager", "default"), stage=said.append)
    assert time.mode == "default"
    assert 0 < time.pass_s < time.fused_s and time.plain_s > 0
    assert said[-2:] == ["compiling default", "compiling default with fusionpass"]


@pytest.mark.parametrize("style", ["table", "markdown"])
def test_compile_run(style):
    measured = CompileRun("qwen3_next", 12, "H100", "2.11.0", [CompileTime("default", 20.0, 22.0, 0.11)])
    text = measured.text(style)
    assert all(part in text for part in ("qwen3_next, 12 layers, H100", "20.00", "22.00", "1.100", "0.110", "0.50%"))
    assert json.loads(json.dumps(measured.to_dict()))["times"][0]["pass_s"] == 0.11


REFUSED = {
    "compile time of many sizes": (["qwen2_moe", "--compile-time", "--batch", "1,2"], "--batch 1,2: --compile-time"),
    "compile time of a prefill": (["qwen2_moe", "--compile-time", "--prefill", "8"], "--prefill has no effect with"),
    "compile time of eager": (["qwen2_moe", "--compile-time", "--mode", "eager"], "--mode eager compiles nothing"),
    "compile time without a target": (["--compile-time"], "--compile-time has no effect without a TARGET"),
    "op with a target": (["qwen2_moe", "--op", "gated_add"], "--op has no effect with a TARGET"),
    "tokens with a target": (["qwen2_moe", "--tokens", "1"], "--tokens has no effect with a TARGET"),
    "check with a target": (["qwen2_moe", "--check", "x.json"], "--check has no effect with a TARGET"),
    "layers without one": (["--layers", "2"], "--layers has no effect without a TARGET"),
    "batch without one": (["--batch", "2"], "--batch has no effect without a TARGET"),
    "prefill without one": (["--prefill", "2"], "--prefill has no effect without a TARGET"),
    "mode without one": (["--mode", "eager"], "--mode has no effect without a TARGET"),
    "experts without a target": (["--experts", "eager"], "--experts has no effect without a TARGET"),
    "an unknown mode": (
        ["qwen2_moe", "--mode", "eager,fast"],
        "'fast' is no mode: allowed are eager, default, reduce-overhead",
    ),
    "a json file in no folder": (["qwen2_moe", "--json", "/no/such/folder/x.json"], "--json"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


@no_gpu
def test_without_a_gpu(capsys):
    assert main(["bench", "qwen2_moe", "--layers", "2"]) == 2
    error = capsys.readouterr().err
    assert "'qwen2_moe'" in error and "CUDA GPU" in error and len(error.strip().splitlines()) == 1
