"""`gated_add` in float32 and in eager's numerics for every gate of 16 bits, special values, and alignments."""

import ops_layouts_helpers
import pytest
import torch
from ops_helpers import DEVICE, DTYPES, doubled, gated_expression, projected_expression, record_launches, sum_slack
from ops_layouts_helpers import GATED, PROJECTED, dtypes, implementations, kernel_gated_add, normal

from fusionpass.kernels import gated_add as gated_kernel
from fusionpass.kernels import gated_add_aten as gated_aten

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")  # NumPy, of inf and nan
nan_filled = ops_layouts_helpers.nan_filled


def every_16_bit_value(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_eager_numerics_for_every_gate(dtype):
    """Bit for bit ATen's on the same device; where NumPy's exponential stands in for the device's, to one rounding."""
    gate, make = every_16_bit_value(dtype), normal(dtype)
    a, b = make(gate.shape), make(gate.shape)
    expected = gated_expression(a, gate, b)
    assert torch.equal(gated_aten.gated_add(a, gate, b, "eager").nan_to_num(), expected.nan_to_num())
    y = kernel_gated_add(a, gate, b, "eager")
    assert torch.equal(y.isnan(), expected.isnan())
    different = y.nan_to_num() != expected.nan_to_num()
    assert different.float().mean() <= (0.0 if DEVICE == "cuda" else 1e-3)


def special_pairs(dtype):
    """a and b of all 100 pairs of these, and 28 random ones: 128, which blocks of 64 divide and blocks of 256 do not."""
    info = torch.finfo(dtype)
    values = [0.0, -0.0, 1.0, info.tiny / 4, -info.tiny, info.max, float("inf"), float("nan")]
    special = torch.cartesian_prod(*[torch.tensor([*values, -info.max, -float("inf")], dtype=dtype)] * 2)
    generator = torch.Generator().manual_seed(2)
    ordinary = torch.randn((28, 2), generator=generator).to(dtype)
    return torch.cat([special, ordinary]).to(DEVICE).unbind(1)


KERNELS = {  # blocks of the rows kernel, layout of a and b -> the kernel, whether flat
    "rows": (64, lambda t: t.contiguous(), "gated_add_rows_kernel", False),
    "rows, flat": (256, lambda t: t.contiguous(), "gated_add_rows_kernel", True),
    "any layout": (256, lambda t: torch.cat([t, t[:, :1]], 1)[:, :-1], "gated_add_kernel", None),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("block", "lay", "kernel", "flat"), KERNELS.values(), ids=KERNELS)
def test_eager_numerics_for_every_gate_and_special_values(monkeypatch, dtype, block, lay, kernel, flat):
    """All 65,536 gates (a sample of them under the interpreter) beside special and random a and b, in each kernel."""
    monkeypatch.setattr(gated_kernel, "ROW_BLOCKS", ((None, block, 4),))
    recorded = record_launches(monkeypatch, gated_kernel)
    gate = every_16_bit_value(dtype)[:: 1 if DEVICE == "cuda" else 509].unsqueeze(1).contiguous()
    a, b = (lay(t.expand(gate.shape[0], -1)) for t in special_pairs(dtype))
    y, expected = kernel_gated_add(a, gate, b, "eager"), gated_expression(a, gate, b)
    assert [r.kernel for r in recorded] == [kernel] and recorded[0].arguments.get("FLAT") == flat
    assert torch.equal(y.isnan(), expected.isnan())
    number = ~expected.isnan()
    different = y.contiguous().view(torch.int16)[number] != expected.contiguous().view(torch.int16)[number]
    assert different.float().mean() <= (0.0 if DEVICE == "cuda" else 1e-3)


def test_eager_numerics_in_fp32():
    make = normal()
    a, gate, b = make((64, 512)), make((64, 512)) * 20, make((64, 512))
    expected = gated_expression(a, gate, b)
    assert torch.equal(gated_aten.gated_add(a, gate, b, "eager"), expected)
    y = kernel_gated_add(a, gate, b, "eager")
    if DEVICE == "cuda":
        assert torch.equal(y, expected)
    assert (y - expected).abs().max() <= 2 * sum_slack(a, b)


@implementations
@dtypes
@pytest.mark.parametrize("numerics", ["fp32", "eager"])
def test_special_values(implementation, dtype, numerics):
    """0 * inf is nan, -0.0 stays, nothing is skipped where the sigmoid is 0."""
    values = [0.0, -0.0, 1.0, -1.5, float("inf"), float("-inf"), float("nan"), 1000.0, -1000.0, torch.finfo(dtype).tiny]
    a, gate, b = torch.cartesian_prod(*[torch.tensor(values, dtype=dtype, device=DEVICE)] * 3).unbind(1)
    y, expected = GATED[implementation](a, gate, b, numerics), gated_expression(a, gate, b)
    assert torch.equal(y.isnan(), expected.isnan())
    finite = ~expected.isnan()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y[finite], expected[finite], rtol=2 * eps, atol=2 * eps)  # values to 2.5 that may cancel
    zero = finite & (expected == 0)
    assert torch.equal(y[zero].signbit(), expected[zero].signbit())


@implementations
def test_gate_projected_add_special_values(implementation):
    make = normal()
    a, b, weight = make((4, 8)), make((4, 8)), torch.ones(1, 2, device=DEVICE)
    b[0, 0] = float("inf")
    x = torch.tensor([[-1000.0, 0.0], [float("inf"), 0.0], [float("nan"), 0.0], [0.0, 0.0]], device=DEVICE)
    y, expected = PROJECTED[implementation](x, weight, None, a, b), projected_expression(x, weight, None, a, b)
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert y[0, 0].isnan() and y[2].isnan().all()


def test_numerics_fp32_rounds_once():
    """Closer to the truth than three roundings: in a bf16 sample no element is more than one rounding off."""
    make = normal(torch.bfloat16)
    a, gate, b = make((64, 64)), make((64, 1)), make((64, 64))
    once = gated_expression(*doubled(a, gate, b)).float().to(torch.bfloat16)
    for implementation in GATED.values():
        assert (implementation(a, gate, b) != once).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_layout_at_other_addresses(dtype):
    """A launch reused for equal sizes and strides must not reuse what was compiled for another alignment or dtype."""
    rows, width = 4, 32
    near = dict(rtol=0.05, atol=0.05)  # a wrong address shows in the first digit; exactness is held elsewhere
    for start in (0, 1, 8, 1, 0):  # in elements: aligned to 16 bytes or not
        parts = []
        for seed in range(3):
            buffer = torch.randn(start + rows * width, generator=torch.Generator().manual_seed(seed))
            parts.append(buffer.to(DEVICE, dtype)[start:].view(rows, width))
        a, x, b = parts
        gate, weight = x[:, :1].contiguous(), x[:1]
        got = torch.ops.fusionpass.gated_add(a, gate, b)
        torch.testing.assert_close(got, a + torch.sigmoid(gate) * b, **near)
        got = torch.ops.fusionpass.gate_projected_add(x, weight, None, a, b)
        expected = a + torch.sigmoid(torch.nn.functional.linear(x, weight)) * b
        torch.testing.assert_close(got, expected, **near)
