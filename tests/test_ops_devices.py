"""Which implementation computes: the kernels where they run, ATen everywhere else; and sizes of zero."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from ops_helpers import DEVICE, DIRECT, fill_fresh_memory_with_nan

import fusionpass
from fusionpass.operators import gate_projected_add, gated_add, implementations, moe_combine

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
OPS = torch.ops.fusionpass
NAMES = ["gated_add", "gate_projected_add", "moe_combine"]
DECLARED = gated_add, gate_projected_add, moe_combine
KERNELS = [(module, "kernel") for module in DECLARED]
KERNELS += [(module, "backward_kernel") for module in (gated_add, gate_projected_add)]
needs_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="stands in for another device")


def drawn(*shapes, dtype=F32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def call(name, way=OPS, dtype=F32, dtype_of_b=None, records=False):
    x, weight, a, b, gate = (
        t.requires_grad_(records) for t in drawn((3, 6), (1, 6), (3, 8), (3, 8), (3, 1), dtype=dtype)
    )
    b = b if dtype_of_b is None else b.detach().to(dtype_of_b)
    if name == "gated_add":
        return way.gated_add(a, gate, b)
    if name == "gate_projected_add":
        return way.gate_projected_add(x, weight, None, a, b)
    return way.moe_combine(a, b, x=x, gate_weight=weight, residual=a)[0]


@pytest.fixture
def kernels_forbidden(monkeypatch):
    def forbidden():
        raise AssertionError("the kernels were asked for")

    for module, name in KERNELS:
        monkeypatch.setattr(module, name, forbidden)


@needs_cpu
@pytest.mark.parametrize("way", [OPS, DIRECT], ids=["op", "direct"])
@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_device_without_kernels(monkeypatch, kernels_forbidden, name, records, way):
    """As of a GPU where Triton cannot be imported: forward and backward are ATen's."""
    monkeypatch.setattr(implementations, "kernel_dtypes", lambda a: implementations.NONE)
    for module in DECLARED:
        monkeypatch.setattr(module, "kernel_dtypes", lambda a: implementations.NONE)
    y = call(name, way, records=records)
    if records:
        y.sum().backward()
    assert not y.isnan().any()


@needs_cpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dtype", "dtype_of_b", "taken"), [(F16, None, True), (BF16, None, False), (F32, BF16, False), (F32, None, True)]
)
def test_a_gpu_without_bf16(monkeypatch, name, dtype, dtype_of_b, taken):
    """As of compute capability 7.5: what has bf16 in it is ATen's, the rest the kernels'."""
    asked = []
    for module in (implementations, *DECLARED):
        monkeypatch.setattr(module, "kernel_dtypes", lambda a: implementations.NO_BFLOAT16)
    for module, kernel in KERNELS:
        found = getattr(module, kernel)
        monkeypatch.setattr(module, kernel, lambda found=found: asked.append(1) or found())
    for way in (OPS, DIRECT):
        asked.clear()
        assert not call(name, way, dtype, dtype_of_b).isnan().any()
        assert bool(asked) == taken


@needs_cpu
@pytest.mark.parametrize(
    ("triton", "capability", "expected"),
    [
        (False, (9, 0), implementations.NONE),
        (True, (7, 5), implementations.NO_BFLOAT16),
        (True, (8, 0), implementations.ALL),
        (True, (9, 0), implementations.ALL),
    ],
)
def test_the_choice_of_a_gpu(monkeypatch, triton, capability, expected):
    monkeypatch.setattr(implementations, "has_triton", lambda: triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert implementations.dtypes_of_gpu.__wrapped__(torch.device("cuda", 0)) == expected


@pytest.mark.parametrize("error", [None, ImportError])
def test_whether_triton_is_there(monkeypatch, error):
    def importing(name, *args, **kwargs):
        if error and name == "triton":
            raise error(name)
        return found(name, *args, **kwargs)

    found = implementations.importlib.import_module
    monkeypatch.setattr(implementations.importlib, "import_module", importing)
    assert implementations.has_triton.__wrapped__() == (error is None)


@needs_cpu
def test_without_triton_installed():
    """In a process where `import triton` fails: the ops, the public function and a fused function compute."""
    program = """
import sys
sys.modules["triton"] = None
import torch, fusionpass
from fusionpass.operators import implementations
a, b, g, w = torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 1), torch.randn(1, 8)
assert not implementations.has_triton()
want = a + torch.sigmoid(g) * b
torch.testing.assert_close(fusionpass.ops.gated_add(a, g, b), want)
torch.testing.assert_close(torch.ops.fusionpass.moe_combine(a, b, gate=g)[0], want)
torch.ops.fusionpass.gate_projected_add(a, w, None, a, b)
torch.testing.assert_close(fusionpass.fuse(lambda a, g, b: a + torch.sigmoid(g) * b)(a, g, b), want)
print("fine")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "fine", done.stderr[-2000:]


@pytest.mark.parametrize("key", ["CPU", "CUDA", "MPS", "XPU", "PrivateUse1", "HPU"])
@pytest.mark.parametrize("op", [*NAMES, "_gated_add_out", "_gated_add_backward", "_gate_projected_add_backward"])
def test_every_device_has_a_form(op, key):
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"fusionpass::{op}", key)


# Sizes of zero.


@pytest.fixture(params=["kernel", "aten"] if DEVICE == "cpu" else ["kernel"])
def implementation(request, monkeypatch):
    monkeypatch.setattr(implementations, "interpreted", lambda: request.param == "kernel")
    fill_fresh_memory_with_nan(monkeypatch)


def eager(x, weight, bias, a, b):
    return a + torch.sigmoid(torch.nn.functional.linear(x, weight, bias)) * b


SIZES = {"no columns of x": (3, 0, 8), "no rows": (0, 6, 8), "no columns of a": (3, 6, 0), "nothing": (0, 0, 0)}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize(("t", "k", "h"), SIZES.values(), ids=SIZES)
def test_sizes_of_zero(implementation, t, k, h, dtype, bias):
    x, weight, beta, a, b = drawn((t, k), (1, k), (1,), (t, h), (t, h), dtype=dtype)
    inputs = x, weight, beta if bias else None, a, b
    near = {"rtol": torch.finfo(dtype).eps * 2, "atol": torch.finfo(dtype).eps * 2}
    for way in (OPS, DIRECT):
        torch.testing.assert_close(way.gate_projected_add(*inputs), eager(*inputs), **near)
    if h:
        options = {"x": x, "gate_weight": weight, "gate_bias": inputs[2], "residual": a}
        for way in (OPS, DIRECT):
            torch.testing.assert_close(way.moe_combine(a, b, **options)[0], a + eager(*inputs), **near)


@pytest.mark.parametrize(("t", "k", "h"), SIZES.values(), ids=SIZES)
def test_gradients_of_sizes_of_zero(implementation, t, k, h):
    def gradients(function):
        given = [g.requires_grad_() for g in drawn((t, k), (1, k), (1,), (t, h), (t, h))]
        return torch.autograd.grad(function(*given).square().sum(), given)

    for got, want in zip(gradients(OPS.gate_projected_add), gradients(eager), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_program_whose_gate_reads_no_columns(inner):
    def run(r, x, weight, bias, a, b):
        return r + eager(x, weight, bias, a, b)

    inputs = drawn((4, 8), (4, 0), (1, 0), (1,), (4, 8), (4, 8))
    with torch.no_grad(), fusionpass.collect() as report:
        torch.testing.assert_close(fusionpass.fuse(run, inner=inner)(*inputs), run(*inputs))
    (site,) = report.rewrites
    assert {"stage": "gate_projection", "code": "gate-columns"}.items() <= site.stopped[0].items()


def test_sparse_operands_are_refused():
    a, gate, b = drawn((4, 8), (4, 1), (4, 8))
    with pytest.raises(RuntimeError, match="b has layout torch.sparse_coo, allowed: torch.strided"):
        OPS.gated_add(a, gate, b.to_sparse())
