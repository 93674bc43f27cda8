"""The ops on a GPU alone: compiled variants, profilers' hooks, threads, graphs, dependent launch."""

import os
import subprocess
import sys
import threading

import ops_layouts_helpers
import pytest
import torch
from ops_helpers import (
    DEVICE,
    DTYPES,
    assert_no_worse,
    forget_calls,
    gated_expression,
    projected_expression,
    projected_slack,
    record_launches,
)
from ops_layouts_helpers import normal

from fusionpass.kernels import gate_projected_add as projected_kernel
from fusionpass.kernels import gated_add as gated_kernel
from fusionpass.kernels import launching

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")  # NumPy, of inf and nan
nan_filled = ops_layouts_helpers.nan_filled

on_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="what is tested needs a GPU")
gated_add_op = torch.ops.fusionpass.gated_add.default
projected_op = torch.ops.fusionpass.gate_projected_add.default


def at_offset(tensor, start):
    """The same values `start` elements into other memory."""
    memory = torch.zeros(start + tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    memory[start:].copy_(tensor.reshape(-1))
    return memory[start:].view(tensor.shape)


def chain_operands(dtype=torch.bfloat16, rows=32, width=512):
    make = normal(dtype)
    x, weight = make((rows, width)), make((1, width)) / width**0.5
    return x, weight, make((1,)), make((rows, width)), make((rows, 1)), make((rows, width))


@on_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_variants_for_alignments(monkeypatch, dtype):
    recorded = record_launches(monkeypatch, gated_kernel, projected_kernel)
    x, weight, bias, a, gate, b = chain_operands(dtype)
    expected = gated_add_op(a, gate, b)
    for _ in range(2):
        for starts in ((0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 1, 1), (0, 0, 0)):
            x1, a1, b1 = map(at_offset, (x, a, b), starts)
            assert torch.equal(gated_add_op(a1, gate, b1), expected)
            y, eager = projected_op(x1, weight, bias, a1, b1), projected_expression(x, weight, bias, a, b)
            truth = projected_kernel.gate_projected_add_reference(x, weight, bias, a, b)
            assert_no_worse(y, eager, truth, projected_slack(x, weight, a, b))  # a variant may sum in another order
    assert [r.kernel for r in recorded] == ["gated_add_rows_kernel", "gate_projected_add_kernel"]
    assert [len(r.launch._variants) for r in recorded] == [3, 4]  # x is the second kernel's alone


@on_cuda
def test_launch_hooks_hear_every_call():
    import triton

    x, weight, bias, a, gate, b = chain_operands()
    knobs, heard = triton.knobs.runtime, []

    def hook(metadata):
        heard.append(metadata.get()["name"])

    def run():
        gated_add_op(a, gate, b)
        projected_op(x, weight, bias, a, b)

    run()
    chain = hasattr(knobs.launch_enter_hook, "add")
    if chain:
        knobs.launch_enter_hook.add(hook)
    else:
        knobs.launch_enter_hook = hook
    try:
        run()
        run()
    finally:
        if chain:
            knobs.launch_enter_hook.remove(hook)
        else:
            knobs.launch_enter_hook = None
    run()
    assert heard == ["gated_add_rows_kernel", "gate_projected_add_kernel"] * 2


@on_cuda
def test_a_repeated_call_skips_tritons_launch(monkeypatch):
    recorded = record_launches(monkeypatch, gated_kernel)
    *_, a, gate, b = chain_operands()
    expected = gated_add_op(a, gate, b)

    def refuse(self, tensors):
        raise AssertionError("inspected once more")

    monkeypatch.setattr(launching.Launch, "_ordinary", refuse)
    assert torch.equal(gated_add_op(a, gate, b), expected)
    assert len(recorded) == 1


@on_cuda
def test_threads(monkeypatch):
    """Layouts met for the first time by two threads at once, each on a stream of its own."""
    forget_calls(monkeypatch, gated_kernel, projected_kernel)
    cases = [chain_operands(rows=rows, width=width) for rows in (1, 3, 32) for width in (64, 512, 1000)]
    start, wrong = threading.Barrier(2), []

    def run():
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                start.wait()
                for _ in range(5):
                    for x, weight, bias, a, gate, b in cases:
                        y, z = gated_add_op(a, gate, b), projected_op(x, weight, bias, a, b)
                        near = dict(rtol=0.05, atol=0.05)
                        torch.testing.assert_close(y, gated_expression(a, gate, b), **near)
                        torch.testing.assert_close(z, projected_expression(x, weight, bias, a, b), **near)
        except BaseException as error:
            wrong.append(error)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong


def chain(x, weight, bias, a, gate, b):
    """Ops back to back: each reads what the one before it has just written, as a, b, x or gate, both kernels of each."""
    y = projected_op(x, weight, bias, a, b)
    y = gated_add_op(y, gate, b)
    y = gated_add_op(a, gate, y)
    y = gated_add_op(a, y[:, :1], b)
    y = projected_op(y, weight, bias, y, b)
    return projected_op(x, y[:1] / 16, bias, a, y)


@on_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_graph_capture_and_replay(dtype):
    operands = chain_operands(dtype)
    chain(*operands)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(*operands)
    for seed in range(3):
        for i, operand in enumerate(operands):
            operand.copy_(normal(dtype, 10 * seed + i)(tuple(operand.shape)))
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, chain(*operands))


DEPENDENT = """
import sys
import torch
sys.path.insert(0, sys.argv[3])
import test_ops_gpu as tests
from fusionpass.kernels import programmatic_launch

assert programmatic_launch.dependent_launch(0) is (sys.argv[1] == "1")
results = []
for rows, width in ((1, 2048), (32, 512), (300, 1000)):
    x, weight, bias, a, gate, b = tests.chain_operands(torch.bfloat16, rows, width)
    large = tests.normal(torch.bfloat16, 3)((4096, 4096))

    def behind_a_long_producer(seed):
        # a, b, x, gate and weight are written by kernels that wait for two matrix products of 137 GFLOP each.
        # Their memory is that of the operands before, all NaN: who reads too early sees it.
        slow = (large @ large @ large)[0, 0] * 0 + seed / 64
        fresh = [t + slow for t in (x, weight, bias, a, gate, b)]
        y = tests.gated_add_op(fresh[3], fresh[4], fresh[5])
        z = tests.chain(*fresh)
        for t in fresh:
            t.fill_(float("nan"))  # and who reads too late
        return y, z

    for seed in range(50 if rows == 32 else 10):
        results += behind_a_long_producer(seed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, z = behind_a_long_producer(7)
    for _ in range(10):
        y.fill_(float("nan")), z.fill_(float("nan"))
        graph.replay()
        results += y.clone(), z.clone()
torch.cuda.synchronize()
torch.save([t.cpu() for t in results], sys.argv[2])
"""


@on_cuda
def test_dependent_launch_computes_the_same_bits(tmp_path):
    """Kernels in front are still writing the operands when a dependent one is launched, eagerly and in a graph."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("dependent launch needs compute capability 9.0")
    results = {}
    for chosen in ("0", "1"):
        path = tmp_path / chosen
        done = subprocess.run(
            [sys.executable, "-c", DEPENDENT, chosen, str(path), os.path.dirname(__file__)],
            env={**os.environ, "FUSIONPASS_PDL": chosen},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        results[chosen] = torch.load(path)
    off, on = results["0"], results["1"]
    assert len(off) == len(on) == 2 * (70 + 30)
    for mine, theirs in zip(on, off, strict=True):
        assert not theirs.isnan().any()
        assert torch.equal(mine, theirs)
