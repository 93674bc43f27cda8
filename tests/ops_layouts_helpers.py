"""`gated_add` and `gate_projected_add` by kernel and by ATen, held to the truth and to eager's strides."""

import pytest
import torch
from ops_helpers import (
    DEVICE,
    DTYPES,
    assert_no_worse,
    fill_fresh_memory_with_nan,
    gated_expression,
    projected_expression,
    projected_slack,
    significant,
    sum_slack,
)

from fusionpass.kernels import gate_projected_add as projected_kernel
from fusionpass.kernels import gate_projected_add_aten as projected_aten
from fusionpass.kernels import gated_add as gated_kernel
from fusionpass.kernels import gated_add_aten as gated_aten


def kernel_gated_add(a, gate, b, numerics="fp32"):
    y = gated_aten.empty_sum(a, gate, b)
    gated_kernel.launch(y, a, gate, b, numerics)
    return y


def kernel_gate_projected_add(x, weight, bias, a, b):
    y = projected_aten.empty_row_gated_sum(a, b)
    projected_kernel.launch(y, x, weight, bias, a, b)
    return y


GATED = {"kernel": kernel_gated_add, "aten": gated_aten.gated_add}
PROJECTED = {"kernel": kernel_gate_projected_add, "aten": projected_aten.gate_projected_add}
implementations = pytest.mark.parametrize("implementation", ["kernel", "aten"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def normal(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator).to(DEVICE, dtype)


@pytest.fixture(autouse=True)
def nan_filled(monkeypatch):
    """Fresh memory is all NaN, so that an element nobody wrote cannot pass."""
    fill_fresh_memory_with_nan(monkeypatch)


def check_gated(implementation, a, gate, b):
    y, eager = GATED[implementation](a, gate, b), gated_expression(a, gate, b)
    assert y.shape == eager.shape and y.dtype == eager.dtype
    assert significant(y) == significant(eager)
    assert_no_worse(y, eager, gated_kernel.gated_add_reference(a, gate, b), sum_slack(a, b))


def check_projected(implementation, x, weight, bias, a, b):
    y, eager = PROJECTED[implementation](x, weight, bias, a, b), projected_expression(x, weight, bias, a, b)
    assert y.shape == eager.shape and y.dtype == eager.dtype
    assert significant(y) == significant(eager)
    truth = projected_kernel.gate_projected_add_reference(x, weight, bias, a, b)
    assert_no_worse(y, eager, truth, projected_slack(x, weight, a, b))
