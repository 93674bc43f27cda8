"""`moe_combine`: its values for every choice of stages, their rounding, and special values."""

import combine_helpers
import pytest
import torch
from combine_helpers import (
    BF16,
    F32,
    F64,
    I32,
    I64,
    assert_same,
    check,
    dtypes,
    eager,
    expression,
    gates,
    halves,
    norms,
    op,
    operands,
    routed_ways,
)
from ops_helpers import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")  # NumPy, of inf and nan
implementation = combine_helpers.implementation
forgotten = combine_helpers.forgotten
nan_filled = combine_helpers.nan_filled


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
