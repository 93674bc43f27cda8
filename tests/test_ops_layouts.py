"""Every layout: the strides TensorIterator gives, and both implementations of both ops reading and writing through them."""

import os
import random
import subprocess
import sys
import threading
from math import prod

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops_helpers import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    assert_no_worse,
    doubled,
    fill_fresh_memory_with_nan,
    forget_calls,
    gated_expression,
    projected_expression,
    projected_slack,
    random_gate_shape,
    random_layout,
    record_launches,
    significant,
    sum_slack,
)

from fusionpass.kernels import gate_projected_add as projected_kernel
from fusionpass.kernels import gate_projected_add_aten as projected_aten
from fusionpass.kernels import gated_add as gated_kernel
from fusionpass.kernels import gated_add_aten as gated_aten
from fusionpass.kernels import launching, layout, programmatic_launch


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
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")  # NumPy, of inf and nan
implementations = pytest.mark.parametrize("implementation", ["kernel", "aten"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def normal(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator).to(DEVICE, dtype)


@pytest.fixture(autouse=True)
def nan_filled(monkeypatch):
    """Fresh memory is all NaN, so that an element nobody wrote cannot pass."""
    fill_fresh_memory_with_nan(monkeypatch)


def test_fresh_memory_is_nan():
    a = normal()((3, 4))
    for made in (
        gated_aten.empty_sum(a, a, a),
        gated_aten.empty_sum(a.t(), a.t(), a.t()),
        projected_aten.empty_row_gated_sum(a.t(), a.t()),
    ):
        assert made.isnan().all()


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


# Strides and loops as pure functions.


def test_sum_strides_are_eagers_on_3000_random_layouts():
    rng = random.Random(0)
    for _ in range(3000):
        shape = tuple(rng.choice([1, 1, 2, 3, 4]) for _ in range(rng.randint(1, 5)))
        gate = random_layout(rng, torch.zeros, random_gate_shape(rng, shape))
        a, b = random_layout(rng, torch.zeros, shape), random_layout(rng, torch.zeros, shape)
        strides = layout.sum_strides(shape, a.stride(), gate.shape, gate.stride(), b.stride())
        made = torch.empty_strided(shape, strides)
        expected = gated_expression(a, gate, b)
        given = shape, a.stride(), gate.shape, gate.stride(), b.stride()
        assert significant(made) == significant(expected), given
        assert significant(gated_aten.empty_sum(a, gate, b)) == significant(expected), given


def test_collapse_visits_what_the_dims_visit():
    rng = random.Random(1)
    for _ in range(300):
        shape = tuple(rng.choice([1, 2, 3]) for _ in range(rng.randint(0, 5)))
        operands = [random_layout(rng, torch.zeros, shape).stride() for _ in range(2)]
        sizes, strides = layout.collapse(shape, *operands)
        offsets = {tuple(layout.row_offset(i, shape, operand) for operand in operands) for i in range(prod(shape))}
        collapsed = {tuple(layout.row_offset(i, sizes, operand) for operand in strides) for i in range(prod(sizes))}
        assert offsets == collapsed
        assert len(sizes) <= len(shape)


@pytest.mark.parametrize(
    ("shape", "strides", "sizes"),
    [
        ((4, 8), [(8, 1), (8, 1)], [32]),
        ((4, 8), [(8, 1), (1, 0)], [4, 8]),
        ((2, 3, 8), [(24, 8, 1), (3, 1, 0)], [6, 8]),
        ((2, 3, 8), [(24, 8, 1), (0, 1, 0)], [2, 3, 8]),
        ((2, 1, 8), [(8, 999, 1)], [16]),
        ((1, 1), [(7, 7)], []),
    ],
)
def test_collapse(shape, strides, sizes):
    assert layout.collapse(shape, *strides)[0] == sizes


@pytest.mark.parametrize(
    ("leads", "run", "rows"),
    [
        ([((6,), (10,)), ((2, 3), (30, 10))], 6, [10, 10]),
        ([((6,), (10,)), ((2, 3), (40, 10))], 3, [10, 10]),
        ([((6, 4), (50, 10)), ((4, 6), (70, 10))], 2, [10, 10]),
        ([((), ()), ((1, 1), (5, 5))], 1, [0, 0]),
    ],
    ids=["one run", "one side padded", "both padded", "one row"],
)
def test_row_runs(leads, run, rows):
    assert layout.row_runs(*leads) == (run, rows)


# Values through layouts.


@implementations
@dtypes
@pytest.mark.parametrize("name", LAYOUTS)
def test_gated_add_layouts(implementation, dtype, name):
    shape, make, lay = (6, 40), normal(dtype), LAYOUTS[name]
    check_gated(implementation, lay(make, shape), make((6, 1)), make(shape))
    check_gated(implementation, make(shape), make((6, 1)), lay(make, shape))
    check_gated(implementation, make(shape), lay(make, shape), make(shape))
    check_gated(implementation, lay(make, shape), lay(make, (6, 1)), lay(make, shape))


@implementations
@pytest.mark.parametrize(
    ("shape", "gate"),
    [
        ((4, 8), (4, 1)),
        ((4, 8), (4, 8)),
        ((4, 8), (8,)),
        ((4, 8), (1,)),
        ((4, 8), (1, 1)),
        ((4, 8), (1, 8)),
        ((8, 8), (8, 1)),
        ((8, 8), (8,)),
        ((2, 3, 4, 5), (2, 1, 4, 5)),
        ((2, 3, 4), (2, 3, 1)),
        ((2, 3, 4), (3, 1)),
        ((2, 3, 4, 5), (1, 3, 1, 5)),
        ((5,), (1,)),
        ((5,), (5,)),
        ((2, 1, 3), (2, 1, 1)),
    ],
    ids=str,
)
def test_gated_add_gate_shapes(implementation, shape, gate):
    make = normal()
    check_gated(implementation, make(shape), make(gate), make(shape))


@implementations
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("width", [0, 1, 7, 1023, 1024, 3000, 12288])
def test_row_widths(implementation, rows, width):
    make = normal(torch.bfloat16)
    a, b = make((rows, width)), make((rows, width))
    check_gated(implementation, a, make((rows, 1)), b)
    check_projected(implementation, make((rows, width + 1)), make((1, width + 1)) / 64, make((1,)), a, b)


@implementations
@pytest.mark.parametrize("dims", [5, 6])
def test_gated_add_more_dims_than_the_kernel_walks(implementation, dims):
    shape, make = (3, 2, 2, 3, 2, 2)[:dims], normal()
    rows = make((*(n + 1 for n in shape[:-1]), shape[-1]))[tuple(slice(n) for n in shape)]
    check_gated(implementation, make(shape), rows, make(shape))


@implementations
@settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), dims=st.integers(1, 6), dtype=st.sampled_from(DTYPES))
def test_gated_add_random_layouts(implementation, seed, dims, dtype):
    rng, make = random.Random(seed), normal(dtype, seed)
    shape = tuple(rng.choice([0] + [1, 2, 3, 4, 9] * 4) for _ in range(dims))
    gate = random_layout(rng, make, random_gate_shape(rng, shape))
    check_gated(implementation, random_layout(rng, make, shape), gate, random_layout(rng, make, shape))


@pytest.mark.parametrize("implementation", ["kernel", "aten"])
@settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), dims=st.integers(1, 4), dtype=st.sampled_from(DTYPES))
def test_into_any_layout(implementation, seed, dims, dtype):
    """Given memory is written wherever its strides say and nowhere else."""
    rng, make = random.Random(seed), normal(dtype, seed)
    shape = tuple(rng.choice([1, 2, 3, 9]) for _ in range(dims))
    a, gate, b = make(shape), make(random_gate_shape(rng, shape)), make(shape)
    base = []
    y = random_layout(rng, lambda shape: base.append(torch.full(shape, 77.0).to(a)) or base[0], shape, expand=False)
    into = {"kernel": gated_kernel.launch, "aten": gated_aten.gated_add_into}[implementation]
    into(y, a, gate, b, "fp32")
    expected = GATED[implementation](a, gate, b)
    assert torch.equal(y, expected)
    assert (base[0] == 77.0).sum() >= base[0].numel() - y.numel()
    y.fill_(77.0)
    assert (base[0] == 77.0).all()


@implementations
@dtypes
@pytest.mark.parametrize("name", LAYOUTS)
def test_gate_projected_add_layouts(implementation, dtype, name):
    make, lay = normal(dtype), LAYOUTS[name]
    x, weight, bias, a, b = make((6, 24)), make((1, 24)) / 5, make((1,)), make((6, 40)), make((6, 40))
    check_projected(implementation, lay(make, (6, 24)), weight, bias, a, b)
    check_projected(implementation, x, lay(make, (1, 24)), bias, a, b)
    check_projected(implementation, x, weight, bias, lay(make, (6, 40)), b)
    check_projected(implementation, x, weight, bias, a, lay(make, (6, 40)))


@implementations
@pytest.mark.parametrize("bias", [None, (1,), (), (1, 1)], ids=["no bias", "[1]", "[]", "[1, 1]"])
@pytest.mark.parametrize("weight", [(1, 24), (24, 1), (24,)], ids=str)
def test_gate_projected_add_weights(implementation, weight, bias):
    make = normal(torch.float16)
    bias = None if bias is None else make(bias)
    check_projected(implementation, make((3, 24)), make(weight), bias, make((3, 7)), make((3, 7)))
    strided = make((*weight[:-1], 3 * weight[-1]))[..., ::3]
    check_projected(implementation, make((3, 24)), strided, bias, make((3, 7)), make((3, 7)))


@implementations
@pytest.mark.parametrize(
    ("x", "a"),
    [
        ((6, 5), (2, 3, 7)),
        ((2, 3, 5), (6, 7)),
        ((3, 2, 5), (2, 3, 7)),
        ((1, 1, 5), (7,)),
        ((5,), (1, 7)),
        ((2, 3, 1), (2, 3, 1)),
    ],
    ids=str,
)
def test_gate_projected_add_rows_are_counted_row_major(implementation, x, a):
    make = normal()
    weight = make((1, x[-1]))
    for laid_out in (lambda make, shape: make(shape), LAYOUTS["transposed"], LAYOUTS["padded rows"]):
        check_projected(implementation, laid_out(make, x), weight, None, laid_out(make, a), make(a))
    if len(a) > 2:
        middle = make((a[0], a[1] + 1, a[2]))[:, :-1]  # leading dims that do not collapse
        check_projected(implementation, make(x), weight, None, middle, make(a))


@implementations
@settings(deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), dims=st.integers(1, 4), dtype=st.sampled_from(DTYPES))
def test_gate_projected_add_random_layouts(implementation, seed, dims, dtype):
    rng, make = random.Random(seed), normal(dtype, seed)
    shape = tuple(rng.choice([1, 2, 3, 4]) for _ in range(dims))
    k = rng.choice([1, 2, 9])
    x_shape = rng.choice([(*shape[:-1], k), (prod(shape[:-1]), k)])
    x, weight = random_layout(rng, make, x_shape), random_layout(rng, make, rng.choice([(1, k), (k, 1), (k,)]))
    a, b = random_layout(rng, make, shape), random_layout(rng, make, shape)
    check_projected(implementation, x, weight, rng.choice([None, make((1,))]), a, b)


# Offsets past 2**31 elements. The storages are reserved, not filled: a few pages are touched.

FAR = 2**31 + 8


def far_rows(make, shape=(2, 8)):
    """Two rows more than 2**31 elements apart."""
    nbytes = 2 * (FAR + shape[1])
    try:
        storage = torch.UntypedStorage(nbytes, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no {nbytes / 2**30:.1f} GiB of address space or memory: {error}")
    tensor = torch.tensor([], dtype=torch.bfloat16, device=DEVICE).set_(storage, 0, shape, (FAR, 1))
    return tensor.copy_(make(shape))


@pytest.mark.parametrize("which", ["a", "gate", "b", "y"])
def test_gated_add_offsets_past_32_bits(which):
    make = normal(torch.bfloat16)
    operands = {name: make((2, 8)) for name in ("a", "gate", "b", "y")}
    expected = kernel_gated_add(*(operands[name] for name in ("a", "gate", "b")))
    far = far_rows(make)
    if which != "y":
        far.copy_(operands[which])
    operands[which] = far
    gated_kernel.launch(operands["y"], operands["a"], operands["gate"], operands["b"])
    assert torch.equal(operands["y"], expected)


@pytest.mark.parametrize("which", ["x", "a", "y"])
def test_gate_projected_add_offsets_past_32_bits(which):
    make = normal(torch.bfloat16)
    operands = {name: make((2, 8)) for name in ("x", "a", "b", "y")}
    weight = make((1, 8))
    expected = kernel_gate_projected_add(operands["x"], weight, None, operands["a"], operands["b"])
    far = far_rows(make)
    if which != "y":
        far.copy_(operands[which])
    operands[which] = far
    projected_kernel.launch(operands["y"], operands["x"], weight, None, operands["a"], operands["b"])
    assert torch.equal(operands["y"], expected)


# Numerics.


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


# Which kernel runs, and how it is cut up.


ROW_LAYOUTS = {  # operands -> kernel, FLAT, elements of a block, programs; blocks of 8 up to 64 elements, 16 beyond
    "blocks divide H": (lambda m: (m((3, 16)), m((3, 1)), m((3, 16))), "rows", False, 8, 6),
    "a block a row": (lambda m: (m((3, 8)), m((3, 1)), m((3, 8))), "rows", False, 8, 3),
    "blocks do not divide H": (lambda m: (m((3, 11)), m((3, 1)), m((3, 11))), "rows", True, 8, 5),
    "H below a block": (lambda m: (m((5, 3)), m((5, 1)), m((5, 3))), "rows", True, 8, 2),
    "the larger block": (lambda m: (m((5, 32)), m((5, 1)), m((5, 32))), "rows", False, 16, 10),
    "the larger, flat": (lambda m: (m((5, 24)), m((5, 1)), m((5, 24))), "rows", True, 16, 8),
    "the last of the smaller": (lambda m: (m((4, 16)), m((4, 1)), m((4, 16))), "rows", False, 8, 8),
    "padded rows": (lambda m: (m((3, 20))[:, :16], m((3, 1)), m((3, 16))), "rows", False, 8, 6),
    "padded, not divided": (lambda m: (m((3, 20))[:, :11], m((3, 1)), m((3, 13))[:, :11]), "rows", False, 8, 6),
    "padded, H below a block": (lambda m: (m((3, 9))[:, :5], m((3, 1)), m((3, 5))), "any", None, None, 1),
    "3-d": (lambda m: (m((2, 3, 16)), m((2, 3, 1)), m((2, 3, 16))), "rows", False, 16, 6),
    "3-d, padded": (lambda m: (m((2, 3, 20))[..., :16], m((2, 3, 1)), m((2, 3, 16))), "rows", False, 16, 6),
    "3-d, leading dims apart": (lambda m: (m((2, 4, 16))[:, :3], m((2, 3, 1)), m((2, 3, 16))), "any", None, None, 1),
    "one row": (lambda m: (m((1, 19)), m((1, 1)), m((1, 19))), "rows", True, 8, 3),
    "one row of blocks": (lambda m: (m((1, 24)), m((1, 1)), m((1, 24))), "rows", False, 8, 3),
    "1-d": (lambda m: (m((19,)), m((1,)), m((19,))), "rows", True, 8, 3),
    "gate expanded over rows": (lambda m: (m((3, 16)), m((1, 1)).expand(3, 1), m((3, 16))), "any", None, None, 1),
    "gate [1]": (lambda m: (m((3, 16)), m((1,)), m((3, 16))), "any", None, None, 1),
    "gate is a column": (lambda m: (m((3, 16)), m((3, 5))[:, 2:3], m((3, 16))), "rows", False, 8, 6),
    "gate expanded, rows padded": (lambda m: (m((3, 20))[:, :16], m((1,)), m((3, 16))), "rows", False, 8, 6),
    "gate [..., H]": (lambda m: (m((3, 16)), m((3, 16)), m((3, 16))), "any", None, None, 1),
    "gate [H]": (lambda m: (m((3, 16)), m((16,)), m((3, 16))), "any", None, None, 1),
    "transposed": (lambda m: (m((16, 3)).t(), m((3, 1)), m((16, 3)).t()), "any", None, None, 1),
    "b transposed": (lambda m: (m((3, 16)), m((3, 1)), m((16, 3)).t()), "any", None, None, 1),
    "every second column": (lambda m: (m((3, 32))[:, ::2], m((3, 1)), m((3, 16))), "any", None, None, 1),
    "a row expanded": (lambda m: (m((1, 16)).expand(3, 16), m((3, 1)), m((3, 16))), "rows", False, 8, 6),
    "H 1": (lambda m: (m((5, 1)), m((5, 1)), m((5, 1))), "any", None, None, 1),
}


@pytest.fixture
def small_row_blocks(monkeypatch):
    monkeypatch.setattr(gated_kernel, "ROW_BLOCKS", ((64, 8, 1), (None, 16, 2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(("operands", "kernel", "flat", "block", "programs"), ROW_LAYOUTS.values(), ids=ROW_LAYOUTS)
def test_which_kernel_adds(monkeypatch, small_row_blocks, dtype, operands, kernel, flat, block, programs):
    recorded = record_launches(monkeypatch, gated_kernel)
    check_gated("kernel", *operands(normal(dtype)))
    (launch,) = recorded
    assert launch.kernel == {"rows": "gated_add_rows_kernel", "any": "gated_add_kernel"}[kernel]
    assert launch.blocks == programs
    if kernel == "rows":
        assert (launch.arguments["FLAT"], launch.arguments["BLOCK"]) == (flat, block)
        assert launch.options["num_warps"] == {8: 1, 16: 2}[block]


def test_numerics_decide_what_is_compiled(monkeypatch, small_row_blocks):
    """Eager's product is rounded, so no multiply-add may be fused; and its sigmoid is exact in 16 bits too."""
    recorded, make = record_launches(monkeypatch, gated_kernel), normal(torch.bfloat16)
    for gate in ((3, 1), (3, 16)):
        for numerics in ("fp32", "eager"):
            kernel_gated_add(make((3, 16)), make(gate), make((3, 16)), numerics)
    told = [(r.options["enable_fp_fusion"], r.arguments["EAGER"], r.arguments["PRECISE"]) for r in recorded]
    assert told == [(True, False, False), (False, True, True)] * 2


def projected_launch(monkeypatch, rows, k, h):
    recorded, make = record_launches(monkeypatch, projected_kernel), normal()
    weight = make((1, k)) / k**0.5
    check_projected("kernel", make((rows, k)), weight, make((1,)), make((rows, h)), make((rows, h)))
    (launch,) = recorded
    return launch.blocks, launch.arguments["BLOCK_K"], launch.arguments["BLOCK_H"]


FEW = projected_kernel.SPLITS[0][0]  # rows


@pytest.mark.parametrize(
    ("rows", "k", "h", "expected"),  # programs, columns of a block of x and of b
    [
        (1, 16, 16, (4, 16, 4)),
        (FEW, 16, 16, (4 * FEW, 16, 4)),
        (FEW + 1, 16, 16, (FEW + 1, 16, 16)),
        (2, 16, 13, (8, 16, 4)),
        (2, 16, 9, (6, 16, 4)),
        (3, 5, 1, (3, 8, 1)),
        (2, 5, 2, (4, 8, 1)),
        (FEW + 1, 40, 50, (4 * (FEW + 1), 16, 16)),
        (2, 40, 50, (2 * 13, 16, 4)),
        (FEW + 1, 16, 17, (2 * (FEW + 1), 16, 16)),
        (FEW + 1, 17, 16, (FEW + 1, 16, 16)),
    ],
    ids=str,
)
def test_how_rows_are_split(monkeypatch, rows, k, h, expected):
    """Few rows take several programs each, H beyond the limit more, K beyond it more rounds; the values are right."""
    monkeypatch.setattr(projected_kernel, "BLOCK_LIMIT", 16)
    assert projected_launch(monkeypatch, rows, k, h) == expected


SPLIT_AND_WARPS = {  # rows, columns: programs, columns of a block of b, warps
    (1, 32): (4, 8, 2),
    (2, 32): (8, 8, 2),
    (3, 32): (6, 16, 2),
    (3, 16): (3, 16, 2),
    (4, 32): (8, 16, 2),
    (5, 32): (5, 32, 2),
    (6, 32): (6, 32, 2),
    (7, 32): (7, 32, 4),
    (4, 64): (8, 32, 8),
}


@pytest.mark.parametrize(("shape", "expected"), SPLIT_AND_WARPS.items(), ids=str)
def test_programs_and_warps_by_rows_and_columns(monkeypatch, shape, expected):
    """The tables, with numbers that the interpreter takes."""
    table = {"SPLITS": ((2, 0, 4), (4, 16, 2)), "COLUMNS_PER_WARP": 8}
    table |= {"FEW_WARPS": 2, "FEW_WARPS_UP_TO": 32, "FEW_WARPS_ROWS": 6}
    for name, value in table.items():
        monkeypatch.setattr(projected_kernel, name, value)
    (rows, h), recorded, make = shape, record_launches(monkeypatch, projected_kernel), normal()
    check_projected("kernel", make((rows, h)), make((1, h)) / h**0.5, None, make((rows, h)), make((rows, h)))
    (launch,) = recorded
    assert (launch.blocks, launch.arguments["BLOCK_H"], launch.options["num_warps"]) == expected


@pytest.mark.parametrize(
    ("k", "h", "expected"),
    [
        (1, 1, (1, 1, 1)),
        (7, 300, (8, 512, 1)),
        (512, 512, (512, 512, 2)),
        (2048, 2048, (2048, 2048, 8)),
        (2048, 5, (2048, 8, 8)),
        (4095, 4096, (4096, 4096, 16)),
        (8192, 8192, (8192, 8192, 16)),
        (8193, 20000, (8192, 8192, 16)),
    ],
    ids=str,
)
def test_blocks_and_warps(k, h, expected):
    assert projected_kernel.blocks_and_warps(k, h) == expected


# Launching.


def test_calls_are_bounded(monkeypatch):
    monkeypatch.setattr(launching.Calls, "LIMIT", 8)
    calls = launching.Calls()
    for i in range(100):
        assert calls.keep(i, -i) == -i
        assert len(calls) <= 8
        assert calls[i] == -i
    assert list(calls) == sorted(calls)  # the newest, in order
    assert set(calls) >= set(range(96, 100))
    full = launching.Calls()
    for i in range(8):
        full.keep(i, i)
    assert list(full) == list(range(8))
    full.keep(8, 8)
    assert list(full) == [4, 5, 6, 7, 8]  # the older half went


def test_a_forgotten_call_is_prepared_again(monkeypatch):
    monkeypatch.setattr(launching.Calls, "LIMIT", 2)
    recorded, make = record_launches(monkeypatch, gated_kernel), normal()
    for rows in (1, 2, 3, 4, 4, 1):
        check_gated("kernel", make((rows, 8)), make((rows, 1)), make((rows, 8)))
    assert len(recorded) == 5


@pytest.mark.parametrize(
    ("a", "strides"),
    [
        (((3, 4), (4, 1)), (4, 1)),
        (((3, 4), (1, 3)), (1, 3)),
        (((3, 4), (1, 3)), (4, 1)),
        (((3, 4), (9, 1)), (4, 1)),
        (((3, 4), (4, 1)), (1, 3)),
        (((1, 4), (9, 1)), (4, 1)),
        (((2, 3, 4), (12, 4, 1)), (4, 8, 1)),
        (((3, 0), (1, 1)), (1, 1)),
    ],
    ids=str,
)
def test_result(a, strides):
    shape, of_a = a
    like = torch.zeros(100, dtype=torch.bfloat16, device=DEVICE).as_strided(shape, of_a)
    y = launching.Result(like, strides).empty(like)
    assert (y.shape, y.stride(), y.dtype, y.device) == (like.shape, strides, like.dtype, like.device)
    assert y.untyped_storage().data_ptr() != like.untyped_storage().data_ptr() or not y.numel()


@pytest.mark.parametrize("chosen", ["2", "", "on"])
def test_a_wrong_choice_of_dependent_launch_names_itself(monkeypatch, chosen):
    monkeypatch.setenv("FUSIONPASS_PDL", chosen)
    with pytest.raises(ValueError, match=f"FUSIONPASS_PDL is '{chosen}', allowed: 0 or 1"):
        programmatic_launch.dependent_launch.__wrapped__(0)


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter is for a CPU")
@pytest.mark.parametrize("chosen", ["0", "1", None])
def test_no_dependent_launch_under_the_interpreter(monkeypatch, chosen):
    if chosen is None:
        monkeypatch.delenv("FUSIONPASS_PDL", raising=False)
    else:
        monkeypatch.setenv("FUSIONPASS_PDL", chosen)
    assert not any(programmatic_launch.dependent_launch.__wrapped__(device) for device in (-1, 0))


# On a GPU alone: compiled variants, profilers' hooks, threads, graphs, dependent launch.

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
import test_ops_layouts as tests
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
