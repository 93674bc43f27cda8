"""Every layout: the strides TensorIterator gives, and both implementations of both ops reading and writing through them."""

import random
from math import prod

import ops_layouts_helpers
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops_helpers import DEVICE, DTYPES, LAYOUTS, gated_expression, random_gate_shape, random_layout, significant
from ops_layouts_helpers import (
    GATED,
    check_gated,
    check_projected,
    dtypes,
    implementations,
    kernel_gate_projected_add,
    kernel_gated_add,
    normal,
)

from fusionpass.kernels import gate_projected_add as projected_kernel
from fusionpass.kernels import gate_projected_add_aten as projected_aten
from fusionpass.kernels import gated_add as gated_kernel
from fusionpass.kernels import gated_add_aten as gated_aten
from fusionpass.kernels import layout

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")  # NumPy, of inf and nan
nan_filled = ops_layouts_helpers.nan_filled


def test_fresh_memory_is_nan():
    a = normal()((3, 4))
    for made in (
        gated_aten.empty_sum(a, a, a),
        gated_aten.empty_sum(a.t(), a.t(), a.t()),
        projected_aten.empty_row_gated_sum(a.t(), a.t()),
    ):
        assert made.isnan().all()


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


FAR = 2**31 + 8  # elements; the storages are reserved, not filled: a few pages are touched


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
