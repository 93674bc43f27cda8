"""Operands of `gated_add` and `gate_projected_add`, and which implementation they meet."""

import sys

import pytest
import torch
from ops_helpers import DEVICE, DTYPES

from fusionpass.operators import implementations

gated_add_op = torch.ops.fusionpass.gated_add.default
projected_op = torch.ops.fusionpass.gate_projected_add.default
F32, I64 = torch.float32, torch.int64
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(params=["kernel", "aten"])
def implementation(request, monkeypatch):
    """On a CPU: the Triton kernels under the interpreter, or the ATen implementation. On CUDA there is one."""
    if DEVICE == "cuda" and request.param == "aten":
        for module in (sys.modules[__name__], request.module):
            monkeypatch.setattr(module, "DEVICE", "cpu", raising=False)
    monkeypatch.setattr(implementations, "interpreted", lambda: request.param == "kernel")


def normal(dtype=torch.float32, seed=0, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_(requires_grad)


def gated_operands(dtype=torch.float32, shape=(4, 8), gate=(4, 1), requires_grad=False):
    make = normal(dtype, requires_grad=requires_grad)
    return make(shape), make(gate), make(shape)


def projected_operands(dtype=torch.float32, weight=(1, 6), bias=(1,), requires_grad=False, rows=(4,)):
    make = normal(dtype, requires_grad=requires_grad)
    bias = None if bias is None else make(bias)
    return make((*rows, 6)), make(weight), bias, make((*rows, 8)), make((*rows, 8))


def gradients(function, inputs, dy, create_graph=False):
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    return torch.autograd.grad(function(*inputs), wanted, dy, create_graph=create_graph)
