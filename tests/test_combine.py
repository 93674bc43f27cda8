"""`moe_combine`: its values for every choice of stages, layouts, refusals, opcheck, gradients, launches, direct calls."""

import random
import sys
from math import prod
from typing import NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from ops_helpers import (
    DEVICE,
    DIRECT,
    DTYPES,
    LAYOUTS,
    ROUNDING,
    assert_no_worse,
    fill_fresh_memory_with_nan,
    largest,
    random_layout,
    record_launches,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import fusionpass.entry.backend
from fusionpass.kernels import launching, moe_combine
from fusionpass.kernels.launching import Calls
from fusionpass.kernels.moe_combine_aten import Arguments, moe_combine_expression
from fusionpass.operators import implementations
from fusionpass.operators import moe_combine as declared

op = torch.ops.fusionpass.moe_combine.default
BF16, F16, F32, F64, I32, I64 = torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32, torch.int64
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")  # NumPy, of inf and nan
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

ROUTED = {  # how `a` comes about -> whether it is a weighted sum, indexed, with weights in the order of y's rows, masked
    "a": (False, False, False, False), "top-k": (True, False, False, False), "indexed": (True, True, False, False),
    "permuted": (True, True, True, False), "masked top-k": (True, False, False, True), "masked": (True, True, True, True),
}  # fmt: skip
GATES = {"gate": (False, False), "x": (True, False), "x, bias": (True, True)}  # whether projected, with a bias
NORMS = {  # eps, whether there is a weight, offset; an eps that shows in bf16
    "no norm": (None, False, 0.0), "no weight": (0.125, False, 0.0), "weight": (0.125, True, 0.0),
    "weight, offset 1": (0.125, True, 1.0),
}  # fmt: skip
routed_ways = pytest.mark.parametrize("routed", ROUTED)
gates = pytest.mark.parametrize("gate", GATES)
norms = pytest.mark.parametrize("norm", NORMS)
halves = pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])


@pytest.fixture(params=["kernel", "aten"])
def implementation(request, monkeypatch):
    """On a CPU: the Triton kernel under the interpreter, or the ATen implementation. On CUDA there is one."""
    if DEVICE == "cuda" and request.param == "aten":
        monkeypatch.setattr(sys.modules[__name__], "DEVICE", "cpu")
    monkeypatch.setattr(implementations, "interpreted", lambda: request.param == "kernel")


@pytest.fixture
def forgotten(monkeypatch):
    """What the kernel module prepared before is out of sight."""
    monkeypatch.setattr(moe_combine, "_known", Calls())


@pytest.fixture
def nan_filled(monkeypatch, forgotten):
    """Fresh memory is all NaN, so that an element nobody wrote cannot pass; the allocator past `torch` is not used."""
    monkeypatch.setattr(launching, "_empty_strided_cuda", None)
    fill_fresh_memory_with_nan(monkeypatch)


@pytest.fixture
def recorded(monkeypatch, forgotten):
    return record_launches(monkeypatch, moe_combine)


def normal(dtype=F32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator).to(DEVICE, dtype)


def indices(slots, seed=0, dtype=I64):
    """A permutation of the rows of y, half of them counted from the end."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (slots,), generator=generator)
    return (torch.randperm(slots, generator=generator) - slots * signs).to(DEVICE, dtype)


def operands(
    dtype=F32, routed="masked", gate="x, bias", residual=True, norm="weight, offset 1", *, rows=5, columns=48, k=40,
    top_k=3, seed=0, weights=None, index=I64,
):  # fmt: skip
    """Every argument of a call by name; `weights` is the dtype of the top-k and norm weights where it is another."""
    make, make_weights = normal(dtype, seed), normal(weights or dtype, seed + 1)
    summed, indexed, permuted, masked = ROUTED[routed]
    projected, bias = GATES[gate]
    eps, weighted, offset = NORMS[norm]
    return {
        "a": make((rows * top_k if summed else rows, columns)),
        "b": make((rows, columns)),
        "gate": None if projected else make((rows, 1)),
        "x": make((rows, k)) if projected else None,
        "gate_weight": make((1, k)) / k**0.5 if projected else None,
        "gate_bias": make((1,)) if bias else None,
        "topk_weights": make_weights((rows, top_k)) if summed else None,
        "inverse": indices(rows * top_k, seed, index) if indexed else None,
        "masked": indices(rows * top_k, seed + 1) % 3 == 0 if masked else None,
        "residual": make((rows, columns)) if residual else None,
        "norm_weight": make_weights((columns,)) if weighted else None,
        "top_k": top_k if summed else 0,
        "permuted": permuted,
        "eps": eps,
        "offset": offset,
    }


TENSORS = list(operands())[:11]
DIFFERENTIABLE = [name for name in TENSORS if name not in ("inverse", "masked")]
PRODUCTS = "a b x gate_weight topk_weights residual".split()  # what is summed up


def expression(dtype=F32, **arguments):
    return moe_combine_expression(Arguments(**arguments), compute=dtype)


def eager(
    a, b, gate, x, gate_weight, gate_bias, topk_weights, inverse, masked, residual, norm_weight, top_k, permuted, eps,
    offset,
):  # fmt: skip
    """As a model writes it: rounded after each op, the norm in float32."""
    h = b.shape[-1]
    routed, b = a.reshape(-1, h), b.reshape(-1, h)
    if top_k:
        weights = topk_weights.reshape(-1, 1)
        routed = routed if masked is None else routed.masked_fill(masked.reshape(-1, 1), 0)
        routed = routed * weights if permuted else routed
        routed = routed if inverse is None else routed[inverse.reshape(-1)]
        routed = routed if permuted else routed * weights
        routed = routed.view(-1, top_k, h).sum(1).to(b.dtype)
    if x is not None:
        bias = None if gate_bias is None else gate_bias.reshape(1)
        gate = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), gate_weight.reshape(1, -1), bias)
    total = routed + torch.sigmoid(gate.reshape(-1, 1)) * b
    if residual is not None:
        total = residual + total.reshape(residual.shape)
    if eps is None:
        return total, total.new_empty(0)
    wide = total.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if norm_weight is None:
        return total, wide.to(b.dtype)
    if offset:
        return total, (wide * (offset + norm_weight.float())).to(b.dtype)
    return total, (norm_weight * wide.to(b.dtype)).to(b.dtype)


def slacks(arguments):
    """What fp32 may add to the errors of the two results: twice a bound of their own errors.

    The sum: a rounding per term and addition and three of the sigmoid, of the terms' absolute sum, and 16 of K products
    (in blocks, then in a tree) through the sigmoid's largest slope, 1/4. The norm: that error through both of its
    factors, and 24 roundings, of which 14 are a tree over H.
    """
    n = {name: t.abs() if name in PRODUCTS and t is not None else t for name, t in arguments.items()}
    gate = n["b"].new_full((prod(n["b"].shape[:-1]),), float("inf"))
    terms = largest(expression(F64, **n | {"gate": gate, "x": None, "norm_weight": None, "eps": None})[0])
    error = (n["top_k"] + 8) * ROUNDING * terms
    if n["x"] is not None and n["x"].numel():
        products = (n["x"].double() @ n["gate_weight"].double().reshape(-1)).max().item()
        error += 16 * ROUNDING * products / 4 * largest(n["b"])
    if n["eps"] is None or not n["b"].numel():
        return 2 * error, 0.0
    total = expression(F64, **arguments)[0]
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + n["eps"])
    normed = largest(total * scale)
    weight = 1.0 if n["norm_weight"] is None else largest(n["norm_weight"].double() + n["offset"])
    return 2 * error, 2 * weight * (error * largest(scale) * (1 + normed) + 24 * ROUNDING * normed)


def check(arguments, call=op):
    """Both results against the truth and eager, and what memory they lie in."""
    results = call(**arguments)
    shaped = arguments["b"] if arguments["residual"] is None else arguments["residual"]
    shapes = [shaped.shape, (0,) if arguments["eps"] is None else shaped.shape]
    storages = {t.untyped_storage().data_ptr() for t in arguments.values() if isinstance(t, torch.Tensor)}
    truths, eagers = expression(F64, **arguments), eager(**arguments)
    for y, shape, truth, theirs, slack in zip(results, shapes, truths, eagers, slacks(arguments), strict=True):
        assert (y.shape, y.dtype, y.device) == (shape, shaped.dtype, shaped.device)
        assert y.is_contiguous() and y.storage_offset() == 0
        if y.numel():
            memory = y.untyped_storage()
            assert memory.nbytes() == y.numel() * y.element_size() and memory.data_ptr() not in storages
            storages.add(memory.data_ptr())
        assert_no_worse(y, theirs.reshape(shape), truth, slack)
    return results


def assert_same(got, expected):
    """The same bits; on CUDA, where sums over a row follow the layout, to one rounding."""
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        if DEVICE == "cpu":
            assert torch.equal(mine, theirs)
        else:
            torch.testing.assert_close(mine, theirs, rtol=torch.finfo(mine.dtype).eps, atol=1e-5)


# Values.


@routed_ways
@pytest.mark.parametrize("gate", ["gate", "x, bias"])
@norms
def test_the_expression_is_the_formula(routed, gate, norm):
    """What all else is compared with, against loops over rows and terms."""
    n = {k: v.double() if getattr(v, "is_floating_point", bool)() else v
         for k, v in operands(F32, routed, gate, True, norm, columns=6, k=4).items()}  # fmt: skip
    totals, norms = expression(F64, **n)
    for t in range(5):
        total = n["a"][t]
        if n["top_k"]:
            total = torch.zeros_like(n["b"][t])
            for slot in range(3 * t, 3 * t + 3):
                source = slot if n["inverse"] is None else n["inverse"][slot].item()
                if n["masked"] is None or not n["masked"][source]:
                    total += n["topk_weights"].reshape(-1)[source if n["permuted"] else slot] * n["a"][source]
        logit = n["gate"][t] if n["x"] is None else n["x"][t] @ n["gate_weight"][0]
        logit = logit if n["gate_bias"] is None else logit + n["gate_bias"]
        total = n["residual"][t] + total + n["b"][t] / (1 + torch.exp(-logit))
        torch.testing.assert_close(totals[t], total)
        if n["eps"] is not None:
            weight = 1.0 if n["norm_weight"] is None else n["norm_weight"] + n["offset"]
            torch.testing.assert_close(norms[t], total / (total.square().mean() + n["eps"]).sqrt() * weight)


@dtypes
@routed_ways
@gates
@norms
def test_stages(implementation, nan_filled, dtype, routed, gate, norm):
    for residual in (False, True):
        check(operands(dtype, routed, gate, residual, norm))


SIZES = [  # rows, columns, K, top_k
    (0, 48, 40, 3), (1, 48, 40, 3), (5, 1, 1, 2), (3, 1, 300, 10), (3, 100, 64, 10), (2, 1023, 1000, 2),
    (2, 3000, 2048, 10), (1, 16, 9000, 1), (2, 16384, 64, 3),
]  # fmt: skip


@dtypes
@pytest.mark.parametrize("norm", ["no norm", "weight"])
@pytest.mark.parametrize(("rows", "columns", "k", "top_k"), SIZES, ids=lambda n: str(n))
def test_sizes(nan_filled, dtype, norm, rows, columns, k, top_k):
    check(operands(dtype, norm=norm, rows=rows, columns=columns, k=k, top_k=top_k))


@dtypes
@pytest.mark.parametrize("index", [I32, I64], ids=["int32", "int64"])
@pytest.mark.parametrize("routed", ["indexed", "masked"])
@pytest.mark.parametrize("top_k", [1, 2, 10, 32])
def test_top_k(nan_filled, dtype, index, routed, top_k):
    check(operands(dtype, routed, top_k=top_k, index=index, rows=3))


@pytest.mark.parametrize("routed", ["indexed", "permuted"])
def test_negative_indices_count_from_the_end(routed):
    arguments = operands(F32, routed)
    slots = arguments["inverse"].numel()
    assert -slots <= arguments["inverse"].min() < 0 < arguments["inverse"].max()
    assert_same(op(**arguments), op(**arguments | {"inverse": arguments["inverse"] % slots}))
    for other in (torch.zeros_like, lambda inverse: torch.full_like(inverse, -1)):  # rows that are read repeatedly
        check(arguments | {"inverse": other(arguments["inverse"])})


@halves
@pytest.mark.parametrize("routed", ["top-k", "permuted"])
@pytest.mark.parametrize("norm", ["weight", "weight, offset 1"])
def test_float32_weights(nan_filled, dtype, routed, norm):
    """They are not rounded on the way in: with them rounded, both results differ."""
    arguments = operands(dtype, routed, norm=norm, weights=F32)
    check(arguments)
    for name, changed in (("topk_weights", 0), ("norm_weight", 1)):
        other = check(arguments | {name: arguments[name].to(dtype)})
        assert not torch.equal(other[changed], op(**arguments)[changed])


def test_masked_rows_may_hold_anything(implementation):
    """Rows that no expert wrote; the mask is in the order of y, like the indices' targets."""
    arguments = operands(BF16)
    assert arguments["masked"].any() and not arguments["masked"].all()
    expected = op(**arguments)
    for value in (float("nan"), float("inf"), 0.0):
        arguments["a"][arguments["masked"]] = value
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(op(**arguments), expected, strict=True))


def test_terms_are_summed_in_fp32(implementation):
    """256 + 1 is 256 in bf16, however often."""
    ones = torch.ones(32, 8, device=DEVICE, dtype=BF16)
    a = torch.cat([256 * ones[:1], ones[:30], 0 * ones[:1]])
    zeros = torch.zeros(1, 8, device=DEVICE, dtype=BF16)
    total, _ = op(a, zeros, gate=zeros[:, 0], topk_weights=ones[:, 0], top_k=32)
    assert (total == 286).all()


@halves
def test_results_are_rounded_once(implementation, dtype):
    """The norm too is of the sum before its rounding."""
    arguments = operands(dtype, rows=16, columns=256, top_k=4)
    for y, truth in zip(op(**arguments), expression(F64, **arguments), strict=True):
        assert (y != truth.to(dtype)).float().mean() < 2e-3


# Layouts and shapes.


def laid_out(arguments, name, lay):
    """The arguments with one operand made anew in another layout."""
    old, make = arguments[name], normal(arguments[name].dtype, 7)
    if not old.is_floating_point():  # any index is in range, any number a mask
        make = lambda shape: (torch.arange(prod(shape)) * 7 % 36 - 18).view(shape).to(DEVICE, old.dtype)  # noqa: E731
    return arguments | {name: lay(make, tuple(old.shape))}


def shaped_operands(dtype=BF16, gate="x, bias", **others):
    """Operands with all the dims they may have."""
    n = operands(dtype, gate=gate, rows=6, columns=40, k=24, **others)
    a, inverse, residual = n["a"].view(6, 3, 40), n["inverse"].view(6, 3), n["residual"].view(2, 3, 40)
    return n | {"a": a, "inverse": inverse, "masked": n["masked"].view(6, 3), "residual": residual}


def contiguous(arguments):
    return {name: t.contiguous() if isinstance(t, torch.Tensor) else t for name, t in arguments.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TENSORS)
def test_layouts(nan_filled, name, layout):
    arguments = laid_out(shaped_operands(gate="gate" if name == "gate" else "x, bias"), name, LAYOUTS[layout])
    assert_same(check(arguments), op(**contiguous(arguments)))


@pytest.mark.parametrize("seed", range(20))
def test_random_layouts(nan_filled, seed):
    rng = random.Random(seed)
    arguments = shaped_operands(rng.choice(DTYPES), rng.choice(list(GATES)), seed=seed)
    for name in TENSORS:
        if arguments[name] is not None:
            arguments = laid_out(arguments, name, lambda make, shape: random_layout(rng, make, shape))
    assert_same(check(arguments), op(**contiguous(arguments)))


SHAPES = {  # of 6 rows, 40 columns, K 24 and top_k 3
    "a": [(18, 40), (6, 3, 40), (2, 3, 3, 40)],
    "b": [(6, 40), (2, 3, 40), (6, 1, 40)],
    "gate": [(6,), (6, 1), (1, 6), (2, 3), (2, 3, 1)],
    "x": [(6, 24), (2, 3, 24), (3, 2, 24)],
    "gate_weight": [(1, 24), (24, 1), (24,)],
    "gate_bias": [(), (1,), (1, 1)],
    "topk_weights": [(18,), (6, 3), (2, 3, 3), (18, 1)],
    "inverse": [(18,), (6, 3), (2, 3, 3)],
    "masked": [(18,), (6, 3), (18, 1)],
    "residual": [(6, 40), (2, 3, 40), (1, 6, 40)],
    "norm_weight": [(40,), (1, 40)],
}


@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name in SHAPES for shape in SHAPES[name]], ids=str)
def test_shapes(implementation, nan_filled, name, shape):
    """Operands are told apart by their rows and elements; the results have the shape of the residual, or of b."""
    for residual in (True, False):
        arguments = shaped_operands(gate="gate" if name == "gate" else "x, bias")
        arguments["residual"] = arguments["residual"] if residual else None
        expected = op(**arguments)
        if arguments[name] is not None:
            arguments[name] = arguments[name].reshape(shape)
        got = op(**arguments)
        shaped = arguments["residual"] if residual else arguments["b"]
        assert all(y.shape == shaped.shape for y in got)
        assert_same(got, [y.reshape(shaped.shape) for y in expected])


def test_one_dim(implementation, nan_filled):
    """b of one row without a dim for it."""
    n = operands(rows=1)
    check(n | {"b": n["b"][0], "x": n["x"][0], "residual": None})


@pytest.mark.parametrize("norm", NORMS)
def test_no_rows(monkeypatch, implementation, recorded, norm):
    monkeypatch.setattr(moe_combine, "_launch", None)  # must not be called
    for residual in (None, torch.zeros(0, 3, 48, device=DEVICE), torch.zeros(3, 0, 48, device=DEVICE)):
        arguments = operands(residual=False, norm=norm, rows=0) | {"residual": residual}
        check(arguments)
    assert not recorded


FAR = 2**30 + 8  # the third of these is 2**31 elements away; the storage is reserved, not filled
FAR_STRIDES = {
    "a": [(FAR, 1), (1, FAR)], "b": [(FAR, 1), (1, FAR)], "x": [(FAR, 1), (1, FAR)], "residual": [(FAR, 1), (1, FAR)],
    "topk_weights": [(FAR, 1)], "masked": [(FAR,)], "gate_weight": [(1, FAR)], "norm_weight": [(FAR,)],
}  # fmt: skip


@pytest.mark.parametrize(("name", "strides"), [(name, s) for name in FAR_STRIDES for s in FAR_STRIDES[name]], ids=str)
def test_offsets_past_32_bits(monkeypatch, recorded, name, strides):
    arguments = operands(BF16, rows=3, columns=3, k=3, top_k=1)
    expected, old = op(**arguments), arguments[name]
    try:
        storage = torch.UntypedStorage(2 * (2 * FAR + 16), device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no 4 GiB of address space or memory: {error}")
    arguments[name] = torch.tensor([], dtype=old.dtype, device=DEVICE).set_(storage, 0, old.shape, strides).copy_(old)
    launch = launching.Launch.__call__

    def checked(self, *pointers):  # ahead of the launch, which would end the process
        assert [r.arguments["WIDE"] for r in recorded] == [False, strides[-1] == FAR and name != "masked"]
        launch(self, *pointers)

    monkeypatch.setattr(launching.Launch, "__call__", checked)
    assert_same(op(**arguments), expected)


# Special values.


@dtypes
@routed_ways
def test_special_values(nan_filled, dtype, routed):
    """0 * inf is nan, -0.0 stays where one term has it, nothing is skipped where a weight or the sigmoid is 0."""
    info = torch.finfo(dtype)
    values = [0.0, -0.0, 1.0, -1.5, float("inf"), float("-inf"), float("nan"), 2.0, info.tiny, -info.tiny / 4]
    values = torch.tensor(values, dtype=dtype, device=DEVICE)
    a, b = torch.cartesian_prod(values, values).unbind(1)
    arguments = operands(dtype, routed, "gate", False, "no norm", rows=10, columns=100, top_k=2)
    gate = values.where(values != 2.0, -1e4)  # whose sigmoid is 0
    arguments |= {"a": a.repeat(arguments["a"].shape[0], 1), "b": b.repeat(10, 1), "gate": gate}
    if arguments["top_k"]:
        arguments["topk_weights"] = values[torch.arange(20, device=DEVICE) * 7 % 10]
    y, expected = op(**arguments)[0], eager(**arguments)[0]
    assert torch.equal(y.isnan(), expected.isnan())
    number = ~expected.isnan()
    torch.testing.assert_close(y[number], expected[number], rtol=3 * info.eps, atol=8 * info.eps)
    if routed == "a":
        zero = expected == 0
        assert zero.any() and torch.equal(y[zero].signbit(), expected[zero].signbit())


ROWS = {  # of a, with b and the residual 0
    "zeros": (0.0, 0.0, 0.0), "negative zeros": (-0.0, -0.0, -0.0), "an inf": (1.0, float("inf"), 0.0),
    "a nan": (1.0, float("nan"), 0.0), "subnormals": (1e-40, -1e-39, 0.0), "squares underflow": (1e-25, -1e-30, 0.0),
    "squares overflow": (1e25, 1.0, 0.0), "ordinary": (1.0, -2.0, 0.5),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_norm_of_special_rows(nan_filled, dtype, eps, row):
    """Zeros over sqrt(eps) are zeros, and without eps nan."""
    arguments = operands(dtype, "a", "gate", True, "weight, offset 1", rows=1, columns=3) | {"eps": eps}
    a = torch.tensor([row], dtype=dtype, device=DEVICE)
    arguments |= {"a": a, "b": torch.zeros_like(a), "residual": torch.zeros_like(a)}
    for y, expected in zip(op(**arguments), eager(**arguments), strict=True):
        # On a GPU the reciprocal square root may take a subnormal mean for 0.
        if DEVICE == "cpu" or eps or row == (1.0, -2.0, 0.5):
            near = dict(rtol=3 * torch.finfo(dtype).eps, atol=0.0 if DEVICE == "cpu" else 1e-37, equal_nan=True)
            torch.testing.assert_close(y, expected, **near)


# Refusals.


class Of(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype = F32
    device: str | None = None


PLAIN = {"a": Of((4, 8)), "b": Of((4, 8)), "gate": Of((4, 1))}
TOP_K = PLAIN | {"a": Of((8, 8)), "topk_weights": Of((4, 2)), "top_k": 2}
INDEXED = TOP_K | {"inverse": Of((8,), I64)}
PROJECTED = PLAIN | {"gate": None, "x": Of((4, 6)), "gate_weight": Of((1, 6))}
REFUSALS = {
    "float64": (PLAIN | {"b": Of((4, 8), F64)}, "b is torch.float64, allowed: bfloat16"),
    "a's dtype": (PLAIN | {"a": Of((4, 8), F64)}, "a is torch.float64, allowed: bfloat16, float16 or float32"),
    "gate's dtype": (PLAIN | {"gate": Of((4,), I64)}, "gate is torch.int64, allowed: bfloat16"),
    "bias's dtype": (PROJECTED | {"gate_bias": Of((1,), F16)}, "gate_bias is torch.float16, allowed: torch.float32"),
    "residual's dtype": (PLAIN | {"residual": Of((4, 8), F64)}, "residual is torch.float64, allowed: bfloat16"),
    "top-k weights' dtype": (TOP_K | {"topk_weights": Of((8,), F64)}, "topk_weights is torch.float64, allowed: bfloat16"),
    "norm weight's dtype": (PLAIN | {"eps": 0.1, "norm_weight": Of((8,), F64)}, "norm_weight is torch.float64"),
    "inverse's dtype": (INDEXED | {"inverse": Of((8,), torch.int16)}, "inverse is torch.int16, allowed: torch.int32 or"),
    "mask's dtype": (TOP_K | {"masked": Of((8,), I32)}, "masked is torch.int32, allowed: torch.bool"),
    "a's device": (PLAIN | {"a": Of((4, 8), F32, "meta")}, "a is on meta, allowed: "),
    "inverse's device": (INDEXED | {"inverse": Of((8,), I64, "meta")}, "inverse is on meta, allowed: "),
    "no columns": (PLAIN | {"a": Of((4, 0)), "b": Of((4, 0))}, "b has 0 columns, allowed: 1 to 16384"),
    "many columns": (PLAIN | {"a": Of((4, 16385)), "b": Of((4, 16385))}, "b has 16385 columns"),
    "top_k -1": (TOP_K | {"top_k": -1}, "top_k is -1, allowed: 1 to 32 with topk_weights"),
    "top_k 33": (TOP_K | {"top_k": 33, "a": Of((132, 8)), "topk_weights": Of((132,))}, "top_k is 33"),
    "top_k without weights": (TOP_K | {"topk_weights": None}, "top_k is 2, allowed"),
    "weights without top_k": (TOP_K | {"top_k": 0}, "top_k is 0, allowed"),
    "inverse without top_k": (PLAIN | {"inverse": Of((4,), I64)}, "inverse, .*permuted is given and top_k is 0"),
    "mask without top_k": (PLAIN | {"masked": Of((4,), torch.bool)}, "inverse, .*permuted is given and top_k is 0"),
    "permuted without top_k": (PLAIN | {"permuted": True}, "inverse, .*permuted is given and top_k is 0"),
    "permuted without inverse": (TOP_K | {"permuted": True}, "permuted is True, allowed: with inverse"),
    "no gate": (PLAIN | {"gate": None}, "allowed: either gate, or x and gate_weight"),
    "both gates": (PROJECTED | {"gate": Of((4,))}, "allowed: either gate, or x and gate_weight"),
    "x alone": (PROJECTED | {"gate_weight": None}, "allowed: either gate, or x and gate_weight"),
    "gate and its weight": (PLAIN | {"gate_weight": Of((1, 8))}, "allowed: either gate, or x and gate_weight"),
    "a's rows": (PLAIN | {"a": Of((5, 8))}, r"a is \[5, 8\], allowed: 32 elements for b \[4, 8\]"),
    "a's slots": (TOP_K | {"a": Of((4, 8))}, r"a is \[4, 8\], allowed: 64 elements"),
    "top-k weights": (TOP_K | {"topk_weights": Of((4,))}, r"topk_weights is \[4\], allowed: 8 elements"),
    "inverse": (INDEXED | {"inverse": Of((4,), I64)}, r"inverse is \[4\], allowed: 8 elements"),
    "masked": (TOP_K | {"masked": Of((4, 2, 8), torch.bool)}, r"masked is \[4, 2, 8\], allowed: 8 elements"),
    "gate": (PLAIN | {"gate": Of((4, 8))}, r"gate is \[4, 8\], allowed: 4 elements"),
    "residual": (PLAIN | {"residual": Of((8,))}, r"residual is \[8\], allowed: 32 elements"),
    "norm weight": (PLAIN | {"eps": 0.1, "norm_weight": Of((1,))}, r"norm_weight is \[1\], allowed: 8 elements"),
    "bias without x": (PLAIN | {"gate_bias": Of((1,))}, "gate_bias is given without x"),
    "bias": (PROJECTED | {"gate_bias": Of((2,))}, r"gate_bias is \[2\], allowed: 1 elements"),
    "a's columns": (PLAIN | {"a": Of((8, 4))}, r"a is \[8, 4\], allowed: 8 columns as b"),
    "residual's columns": (PLAIN | {"residual": Of((8, 4))}, r"residual is \[8, 4\], allowed: 8 columns as b"),
    "x's rows": (PROJECTED | {"x": Of((3, 6))}, r"x is \[3, 6\], allowed: as many rows as b, which is \[4, 8\]"),
    "gate weight": (PROJECTED | {"gate_weight": Of((2, 6))}, r"gate_weight is \[2, 6\], allowed: \[1, 6\], \[6, 1\] or"),
    "gate weight's K": (PROJECTED | {"gate_weight": Of((8,))}, r"gate_weight is \[8\]"),
    "norm weight without eps": (PLAIN | {"norm_weight": Of((8,))}, "norm_weight is given without eps"),
    "0-d b": (PLAIN | {"a": Of(()), "b": Of(()), "gate": Of(())}, "b "),
    "0-d a": (PLAIN | {"a": Of(()), "b": Of((1,)), "gate": Of((1,))}, "a "),
    "0-d residual": ({"a": Of((1,)), "b": Of((1,)), "gate": Of((1,)), "residual": Of(())}, "residual "),
    "0-d x": ({"a": Of((1,)), "b": Of((1,)), "x": Of(()), "gate_weight": Of((1,))}, "x "),
}  # fmt: skip


def tensors(arguments, device):
    """Ones in place of every description; of the device it names, or `device`."""
    return {k: torch.ones(v.shape, dtype=v.dtype, device=v.device or device) if isinstance(v, Of) else v
            for k, v in arguments.items()}  # fmt: skip


@pytest.mark.parametrize("valid", [PLAIN, TOP_K, INDEXED, PROJECTED], ids=["plain", "top-k", "indexed", "projected"])
def test_what_the_refused_calls_are_made_of_is_valid(valid):
    assert op(**tensors(valid, DEVICE))[0].shape == (4, 8)


@pytest.mark.parametrize("way", ["op", "recorded", "aten", "direct", "meta", "fake"])
@pytest.mark.parametrize(("arguments", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(monkeypatch, forgotten, way, arguments, message):
    if way in ("meta", "fake") and "on meta" in message:
        pytest.skip("fake tensors of two devices are refused before the op")
    with FakeTensorMode() if way == "fake" else torch.enable_grad():
        arguments = tensors(arguments, {"meta": "meta", "aten": "cpu"}.get(way, DEVICE))
        if way == "recorded":
            arguments = {k: v.requires_grad_(v.is_floating_point()) if isinstance(v, torch.Tensor) else v
                         for k, v in arguments.items()}  # fmt: skip
        if way == "aten":
            monkeypatch.setattr(implementations, "interpreted", lambda: False)
        with pytest.raises(RuntimeError, match="fusionpass::moe_combine: " + message):
            (DIRECT.moe_combine if way == "direct" else op)(**arguments)


# Under tracers.


def requiring_grad(arguments):
    return {k: v.detach().requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in arguments.items()}  # fmt: skip


OPCHECKED = [
    (BF16, "a", "gate", False, "no norm"), (F32, "a", "x", True, "no weight"), (F16, "top-k", "gate", True, "weight"),
    (F32, "indexed", "x, bias", False, "weight, offset 1"), (BF16, "masked", "x, bias", True, "weight, offset 1"),
]  # fmt: skip


@pytest.mark.parametrize("recorded", [False, True], ids=["", "requires grad"])
@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_opcheck(implementation, recorded, case):
    arguments = operands(*case, rows=4, columns=8, k=6)
    arguments = requiring_grad(arguments) if recorded else arguments
    opcheck(op, (arguments.pop("a"), arguments.pop("b")), arguments)


@pytest.mark.parametrize("layout", ["transposed", "padded rows", "one row, expanded"])
@pytest.mark.parametrize("name", ["a", "b", "x", "residual"])
def test_opcheck_layouts(name, layout):
    arguments = laid_out(shaped_operands(F32), name, LAYOUTS[layout])
    opcheck(op, (arguments.pop("a"), arguments.pop("b")), arguments)


@pytest.mark.parametrize("routed", ["a", "masked"])
def test_compiled_once_for_several_sizes(implementation, routed):
    compiles = []

    def counting(graph, inputs):
        compiles.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def function(tensors):
        if routed == "a":
            return op(**tensors, eps=0.125)
        return op(**tensors, top_k=3, permuted=True, eps=0.125, offset=1.0)

    compiled = torch.compile(function, backend=counting, fullgraph=True, dynamic=True)
    for rows in range(2, 10):
        tensors = dict(list(operands(F32, routed, rows=rows, seed=rows).items())[: len(TENSORS)])
        torch.testing.assert_close(compiled(tensors), function(tensors))
    assert len(compiles) == 1


# Gradients and transforms, of which the op has none of its own.


def gradients(function, arguments, seed=3):
    """Of every floating-point operand, by name."""
    leaves = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.requires_grad}
    results = [y for y in function(**arguments) if y.requires_grad and y.numel()]
    dys = [normal(BF16, seed)(y.shape).to(y) for y in results]  # numbers that no dtype here rounds
    return dict(zip(leaves, torch.autograd.grad(results, list(leaves.values()), dys), strict=True))


@dtypes
@routed_ways
@pytest.mark.parametrize("gate", ["gate", "x, bias"])
@pytest.mark.parametrize("norm", ["no norm", "weight, offset 1"])
def test_gradients_are_no_less_exact_than_the_nodes(implementation, dtype, routed, gate, norm):
    """And rounded once where nothing is rounded between: in fp32, or with neither a projection nor a norm.

    Elsewhere the steps hand on a logit and a sum in 16 bits, as the nodes do, so that no more is saved.
    """
    arguments = requiring_grad(operands(dtype, routed, gate, True, norm, weights=F32))
    doubles = {k: v.double() if getattr(v, "requires_grad", False) else v for k, v in arguments.items()}
    truths = gradients(lambda **n: expression(F64, **n), requiring_grad(doubles))
    got, theirs = gradients(op, arguments), gradients(eager, arguments)
    assert len(got) == len(truths) >= 4
    for name, truth in truths.items():
        assert got[name].shape == truth.shape and got[name].dtype == arguments[name].dtype
        if dtype == F32 or (gate == "gate" and norm == "no norm"):
            # Half a unit for the one rounding, and fp32 sums of up to 240 terms.
            near = dict(rtol=0.51 * torch.finfo(got[name].dtype).eps, atol=1e-6 * max(largest(truth), 10.0))
            torch.testing.assert_close(got[name].double(), truth, **near)
        else:
            # One unit in the last place of the largest element, of the dtype that both round to on the way.
            assert_no_worse(got[name], theirs[name], truth, torch.finfo(dtype).eps * largest(truth))


@pytest.mark.parametrize("wanted", DIFFERENTIABLE)
def test_gradient_of_one_input(implementation, wanted):
    arguments = operands(gate="gate" if wanted == "gate" else "x, bias")
    arguments[wanted].requires_grad_()
    (got,) = gradients(op, arguments).values()
    torch.testing.assert_close(got, gradients(eager, arguments)[wanted], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not any(y.requires_grad for y in op(**arguments))


@pytest.mark.parametrize("wanted", DIFFERENTIABLE)
def test_forward_mode(implementation, wanted):
    """A tangent that is silently zero would be the failure."""
    arguments = operands(gate="gate" if wanted == "gate" else "x, bias")
    tangent = normal(seed=9)(arguments[wanted].shape)
    with forward_ad.dual_level():
        dual = arguments | {wanted: forward_ad.make_dual(arguments[wanted], tangent)}
        for mine, theirs in zip(op(**dual), eager(**dual), strict=True):
            mine, theirs = forward_ad.unpack_dual(mine).tangent, forward_ad.unpack_dual(theirs).tangent
            assert theirs is not None or wanted == "norm_weight"
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


TRANSFORMS = {
    "grad": lambda f, *x: torch.func.grad(lambda *x: sum(y.pow(2).sum() for y in f(*x)), argnums=(0, 1, 2))(*x),
    "jvp": lambda f, *x: torch.func.jvp(f, x, tuple(t.cos() for t in x)),
    "jacrev": lambda f, *x: torch.func.jacrev(f, argnums=1)(*x),
    "hessian": lambda f, *x: torch.func.hessian(lambda x: f(x, x, x)[1].pow(2).sum())(x[0]),
    "vmap": lambda f, *x: torch.vmap(f)(*[torch.stack([t, 2 * t, t.cos()]) for t in x]),
    "vmap of one": lambda f, *x: torch.vmap(f, (0, None, None))(torch.stack([x[0], x[1]]), *x[1:]),
    "vmap of jvp": lambda f, *x: torch.vmap(lambda t: torch.func.jvp(f, x, (t, t, t)))(torch.stack([x[0], x[1]])),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("routed", ["a", "permuted", "masked"])
def test_transforms(implementation, routed, transform):
    arguments = operands(F32, routed, rows=3, columns=8, k=8, top_k=1)
    tensors = [normal(seed=i)((3, 8)) for i in (3, 4, 5)]
    mine, theirs = (
        transform(lambda a, b, x, f=f: f(**arguments | {"a": a, "b": b, "x": x}), *tensors) for f in (op, eager)
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


# Launches.


@pytest.mark.parametrize("norm", ["no norm", "weight"])
@pytest.mark.parametrize("routed", ROUTED)
def test_one_launch_per_call(monkeypatch, recorded, routed, norm):
    launched, launch = [], launching.Launch.__call__
    monkeypatch.setattr(launching.Launch, "__call__", lambda self, *t: launched.append(self) or launch(self, *t))
    for _ in range(3):
        op(**operands(F32, routed, norm=norm))
    (only,) = recorded
    assert launched == [only.launch] * 3
    assert (only.kernel, only.blocks) == ("moe_combine_kernel", 5)
    told = [only.arguments[name] for name in ("TOP_K", "INDEXED", "PERMUTED", "HAS_MASK", "PROJECTED", "HAS_NORM")]
    assert told == [3 * ROUTED[routed][0], *ROUTED[routed][1:], True, norm == "weight"]


def test_variants_are_shared_by_numbers_of_rows(recorded):
    for rows in (1, 3, 4, 1):
        check(operands(BF16, rows=rows))
    op(**operands(BF16, rows=3, norm="no norm"))
    assert [r.blocks for r in recorded] == [1, 3, 4, 3]  # a call with known layouts prepares nothing
    few, *others, without_norm = [r.launch._variants for r in recorded]
    assert all(variants is few for variants in others) and without_norm is not few


@pytest.mark.parametrize("changed", [{"eps": 0.5}, {"offset": 0.0}, {"permuted": False}], ids=str)
def test_equal_layouts_with_other_numbers(changed):
    """A prepared call is not taken for one that differs in nothing else."""
    for arguments in (operands(), operands() | changed, operands()):
        check(arguments)


@pytest.mark.parametrize("registers", [1, 3, 7])
def test_terms_in_groups(monkeypatch, recorded, registers):
    """The loads of a group are on their way together; 10 terms in groups of 1, 3 and 7."""
    monkeypatch.setattr(moe_combine, "REGISTERS", registers)
    check(operands(BF16, columns=64, top_k=10))
    assert [r.arguments["GROUP"] for r in recorded] == [registers]


ALIGNED = {  # dtype, columns, K, elements from row to row of a -> VECTOR
    "bf16": (BF16, 3000, 3000, 3000, 8),
    "fp32": (F32, 3000, 3000, 3000, 4),
    "rows of 8 bytes": (BF16, 3000, 3000, 3004, 4),
    "odd rows": (BF16, 3000, 3000, 3001, 1),
    "K odd": (BF16, 64, 33, 64, 1),
}


@pytest.mark.parametrize(("dtype", "columns", "k", "row", "vector"), ALIGNED.values(), ids=ALIGNED)
def test_vector_is_what_all_rows_are_aligned_to(recorded, dtype, columns, k, row, vector):
    arguments = operands(dtype, rows=1, columns=columns, k=k)
    arguments["a"] = torch.nn.functional.pad(arguments["a"], (0, row - columns))[:, :columns]
    check(arguments)
    (launch,) = recorded
    assert launch.arguments["VECTOR"] == vector and launch.arguments["PRECISE"] == (dtype == F32)


# Direct calls.


@pytest.fixture
def through_op(monkeypatch):
    """The calls that went through the op's Autograd kernel, told by what it asks first."""
    calls, active = [], declared.transforms_active
    monkeypatch.setattr(declared, "transforms_active", lambda: calls.append("moe_combine") or active())
    return calls


@dtypes
@routed_ways
@norms
def test_direct_calls_compute_the_same_bits(through_op, dtype, routed, norm):
    arguments = operands(dtype, routed, norm=norm)
    got = DIRECT.moe_combine(**arguments)
    assert not through_op
    for mine, theirs in zip(got, op(**arguments), strict=True):
        assert mine.dtype == theirs.dtype and mine.stride() == theirs.stride() and torch.equal(mine, theirs)
    assert through_op


def test_direct_calls_are_the_op_where_something_listens(through_op):
    arguments = operands()
    recording, b = requiring_grad(arguments), arguments["b"]
    with torch.no_grad():
        DIRECT.moe_combine(**recording)
    assert not through_op
    mine = gradients(DIRECT.moe_combine, recording)
    assert through_op
    torch.testing.assert_close(mine, gradients(op, recording), rtol=0, atol=0)
    told = [
        torch.func.jvp(lambda b, f=f: f(**arguments | {"b": b}), (b,), (b.cos(),)) for f in (DIRECT.moe_combine, op)
    ]
    torch.testing.assert_close(*told, rtol=0, atol=0)


class Block(torch.nn.Module):
    """The combine region: a projected gate, the residual, the norm."""

    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(8, 1)
        self.norm = torch.nn.RMSNorm(8, eps=0.125)

    def forward(self, x, a, b, residual):
        total = residual + (a.tanh() + torch.sigmoid(self.gate(x)) * b.cos())
        return total.sin(), self.norm(total)


@pytest.mark.parametrize(("inner", "called"), [("eager", DIRECT.moe_combine), ("aot_eager", op)], ids=["eager", "aot"])
def test_graphs_that_python_runs_call_directly(through_op, inner, called):
    torch.manual_seed(0)
    block, graphs = Block().to(DEVICE).requires_grad_(False), []
    args = [normal(seed=i)((4, 8)) for i in range(4)]

    def backend(graph_module, example_inputs):
        graphs.append(graph_module)
        return fusionpass.entry.backend.fusionpass(graph_module, example_inputs, options={"inner": inner})

    compiled = torch.compile(block, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(*args), block(*args))
    through_op.clear()
    compiled(*args)
    assert not through_op or called is op
    (graph,) = graphs
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert [t for t in targets if t in (op, DIRECT.moe_combine)] == [called]
    assert torch.sigmoid not in targets


# What is kept for the backward.


def kept_bytes(function):
    """Of the storages that the backward keeps, each counted once."""
    sizes = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        results = function()
    return sum(sizes.values()), results


NODES = {
    "core": {"top_k": 0, "residual": False, "norm": None},
    "residual": {"top_k": 0, "residual": True, "norm": None},
    "finalize": {"top_k": 2, "residual": True, "norm": None},
    "norm": {"top_k": 0, "residual": True, "norm": 0.0},
    "norm of 1 + weight": {"top_k": 2, "residual": False, "norm": 1.0},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, F32], ids=str)
@pytest.mark.parametrize("projects", [True, False])
@pytest.mark.parametrize(("top_k", "residual", "norm"), [tuple(n.values()) for n in NODES.values()], ids=NODES)
def test_no_more_is_saved_than_by_the_nodes(implementation, dtype, projects, top_k, residual, norm):
    def make(*shape):
        return torch.randn(shape, device=DEVICE, dtype=dtype).requires_grad_()

    t, h = 64, 128
    a, b, r, w = make(t * max(top_k, 1), h), make(t, h), make(t, h), make(h)
    x, gate_weight, gate, topk = make(t, h), make(1, h), make(t, 1), make(t, 2)

    def nodes():
        routed = (a * topk.view(-1, 1)).view(t, 2, h).sum(1) if top_k else a
        total = routed + torch.sigmoid(torch.nn.functional.linear(x, gate_weight) if projects else gate) * b
        total = r + total if residual else total
        if norm is None:
            return total, None
        wide = total.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return total, (normed * (1.0 + w.float())).to(dtype) if norm else w * normed.to(dtype)

    options = {"x": x, "gate_weight": gate_weight} if projects else {"gate": gate}
    options |= {"topk_weights": topk, "top_k": 2} if top_k else {}
    options |= {"residual": r} if residual else {}
    options |= {} if norm is None else {"norm_weight": w, "eps": 1e-6, "offset": norm}
    least, _ = kept_bytes(nodes)
    ours, results = kept_bytes(lambda: torch.ops.fusionpass.moe_combine(a, b, **options))
    assert ours <= least
    assert all(result.requires_grad for result in results if result.numel())
