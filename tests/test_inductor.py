"""Inside Inductor an op is a launch that Inductor makes itself, or the plain expression: no opaque call, no clone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from programs import DEVICE

from fusionpass.bench.cases import OPS, Case, draw
from fusionpass.entry import backend
from fusionpass.operators.moe_combine_bench import EPS, TOP_10

FORWARD = [name for name, op in OPS.items() if not op.backward]
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
COPIES = ("clone", "copy", "auto_functionalized")


@pytest.fixture(scope="module")
def opened():
    """What `opened.py` prints: Inductor's graphs without an interpreter and without a GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("opened.py")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(DEVICE != "cpu", reason="stands in for a GPU")
def test_on_a_cpu_inductor_is_given_the_expression(opened):
    for found in opened["expressions"]:
        assert not [call for call in found["calls"] if "fusionpass" in call]
        assert found["error"] < 1e-2


@pytest.mark.skipif(DEVICE != "cpu", reason="stands in for a GPU")
def test_a_training_step_has_eagers_gradients(opened):
    assert opened["gradient error"] < 1e-5


@pytest.mark.skipif(DEVICE != "cpu", reason="stands in for a GPU")
def test_numerics_eager_are_eagers_bits(opened):
    """Inductor's own code on a CPU has other bits: the op stays one call."""
    assert opened["eager's bits"] == {"differ": 0, "ops": 1}


@pytest.mark.skipif(DEVICE != "cpu", reason="stands in for a GPU")
def test_a_recorded_combine_has_the_gradients_of_its_steps(opened):
    assert opened["combine error"] < 1e-2  # b is in bfloat16, and so is its gradient


@pytest.mark.skipif(DEVICE != "cpu", reason="stands in for a GPU")
def test_the_kernel_is_in_the_graph(opened):
    """One wrapper of a Triton kernel whose results Inductor allocates, for static sizes and for any number of rows."""
    found = {(each["name"], each["dynamic"]) for each in opened["kernels"]}
    whole = {(name, False) for name in FORWARD if name != "gated_add" and OPS[name].found}
    assert found == whole | {("gate_projected_add", True), ("moe_combine", True)}
    for each in opened["kernels"]:
        calls = each["calls"]
        assert sum("triton_kernel_wrapper" in call for call in calls) == 1, calls
        assert sum("empty" in call for call in calls) == (1 if each["name"] == "gate_projected_add" else 2)
        assert not [call for call in calls if "fusionpass" in call or any(copy in call for copy in COPIES)]


@pytest.mark.skipif(DEVICE != "cpu", reason="stands in for a GPU")
def test_a_weighted_sum_of_any_number_of_rows_is_in_the_graph(opened):
    """Indices and weights are as many as the rows: none of their sizes has to be a number."""
    assert sum("triton_kernel_wrapper" in call for call in opened["routed"]) == 1, opened["routed"]
    assert not [call for call in opened["routed"] if "fusionpass" in call]


def compiled_code(function, inputs, **how):
    from torch._inductor.utils import run_and_get_code

    result, codes = run_and_get_code(torch.compile(function, backend=backend.fusionpass, **how), *inputs)
    return result, "\n".join(codes)


@on_gpu
@pytest.mark.parametrize("mode", [None, "reduce-overhead", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("name", [name for name in FORWARD if OPS[name].found])
@pytest.mark.parametrize("tokens", [1, 33])
def test_on_a_gpu(name, tokens, mode):
    inputs = draw(Case(name, tokens, 2048, "bf16"), torch.Generator(DEVICE).manual_seed(0)).inputs
    with torch.no_grad():
        got, code = compiled_code(OPS[name].eager, inputs, dynamic=False, mode=mode)
        truth = OPS[name].eager(*(t.double() if t.is_floating_point() else t for t in inputs))
        eager = OPS[name].eager(*inputs)
    assert "torch.ops.fusionpass" not in code
    assert ("moe_combine_kernel" in code) == (name != "gated_add")
    for g, e, t in zip(*(r if isinstance(r, tuple) else (r,) for r in (got, eager, truth)), strict=True):
        assert (g.double() - t).norm() <= (e.double() - t).norm() * 1.01
        assert g.stride() == e.stride()


@on_gpu
def test_one_compile_over_numbers_of_rows():
    compiles = []

    def counting(graph_module, example_inputs):
        compiles.append(graph_module)
        return backend.fusionpass(graph_module, example_inputs)

    function = torch.compile(OPS["moe_combine"].eager, backend=counting)
    with torch.no_grad():
        for tokens in (2, 5, 64, 1000, 4096):
            inputs = draw(Case("moe_combine", tokens, 2048, "bf16"), torch.Generator(DEVICE).manual_seed(0)).inputs
            for tensor in inputs:
                if tensor.shape[0] == tokens:
                    torch._dynamo.mark_dynamic(tensor, 0)
            for got, want in zip(function(*inputs), OPS["moe_combine"].eager(*inputs), strict=True):
                torch.testing.assert_close(got, want, rtol=2e-2, atol=6e-2)
    assert len(compiles) == 1


@on_gpu
def test_no_rows():
    """Zero tokens: nothing is launched, the results have their shapes."""
    x, w, y, weights, inverse, b, residual, norm = draw(
        Case("moe_combine_top_10", 0, 256, "bf16"), torch.Generator(DEVICE).manual_seed(0)
    ).inputs

    def call():
        options = {"x": x, "gate_weight": w, "residual": residual, "norm_weight": norm, "eps": EPS, "top_k": TOP_10}
        return torch.ops.fusionpass.moe_combine(y, b, topk_weights=weights, inverse=inverse, permuted=True, **options)

    with torch.no_grad():
        total, normed = torch.compile(call, backend=backend.fusionpass)()
    assert total.shape == normed.shape == (0, 256)
