"""Operands of different dtypes, and results in a dtype that is asked for."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from ops_helpers import DEVICE, assert_no_worse, doubled, fill_fresh_memory_with_nan, projected_slack, sum_slack
from torch.library import opcheck

from fusionpass.kernels.moe_combine_aten import Arguments, moe_combine_expression
from fusionpass.operators import implementations

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SHORT = {BF16: "bf16", F16: "fp16", F32: "fp32"}
OPS = torch.ops.fusionpass
# Of a, gate (or x, weight and bias), b.
MIXED = [dtypes for dtypes in product((BF16, F16, F32), repeat=3) if len(set(dtypes)) > 1]
SOME = [(F32, BF16, BF16), (BF16, F32, BF16), (BF16, BF16, F32), (F16, BF16, F32), (BF16, BF16, BF16)]


def named(value):
    return "-".join(SHORT[dtype] for dtype in value) if isinstance(value, tuple) else SHORT.get(value, str(value))


results = pytest.mark.parametrize("dtype", [None, BF16, F16, F32], ids=named)


@pytest.fixture(params=["kernel", "aten"] if DEVICE == "cpu" else ["kernel"], autouse=True)
def implementation(request, monkeypatch):
    monkeypatch.setattr(implementations, "interpreted", lambda: request.param == "kernel")
    fill_fresh_memory_with_nan(monkeypatch)


def drawn(*shapes_and_dtypes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape, dtype in shapes_and_dtypes]


def gated(dtypes, gate=(5, 1), columns=48):
    a, g, b = dtypes
    return drawn(((5, columns), a), (gate, g), ((5, columns), b))


def projected(dtypes, bias=True, k=24):
    a, g, b = dtypes
    x, weight, beta, a, b = drawn(((5, k), g), ((1, k), g), ((1,), g), ((5, 48), a), ((5, 48), b))
    return x, weight, beta if bias else None, a, b


def eager_gated(a, gate, b):
    return a + torch.sigmoid(gate) * b


def eager_projected(x, weight, bias, a, b):
    return a + torch.sigmoid(torch.nn.functional.linear(x, weight, bias)) * b


@results
@pytest.mark.parametrize("gate", [(5, 1), (5, 48)], ids=str)
@pytest.mark.parametrize("dtypes", MIXED, ids=named)
def test_gated_add(dtypes, gate, dtype):
    a, g, b = gated(dtypes, gate)
    eager, y = eager_gated(a, g, b), OPS.gated_add(a, g, b, dtype=dtype)
    assert y.dtype == (eager.dtype if dtype is None else dtype) and y.stride() == eager.stride()
    assert_no_worse(y, eager.to(y.dtype), eager_gated(*doubled(a, g, b)), sum_slack(a, b))
    assert OPS.gated_add(a.to("meta"), g.to("meta"), b.to("meta"), dtype=dtype).dtype == y.dtype


@results
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtypes", SOME, ids=named)
def test_gate_projected_add(dtypes, bias, dtype):
    inputs = x, weight, _, a, b = projected(dtypes, bias)
    eager, y = eager_projected(*inputs), OPS.gate_projected_add(*inputs, dtype=dtype)
    assert y.dtype == (eager.dtype if dtype is None else dtype) and y.stride() == eager.stride()
    assert_no_worse(y, eager.to(y.dtype), eager_projected(*doubled(*inputs)), projected_slack(x, weight, a, b))
    on_meta = [None if t is None else t.to("meta") for t in inputs]
    assert OPS.gate_projected_add(*on_meta, dtype=dtype).dtype == y.dtype


@pytest.mark.parametrize("layout", ["transposed", "padded"])
@pytest.mark.parametrize("dtypes", SOME[:3], ids=named)
def test_layouts(dtypes, layout):
    def laid_out(t):
        return t.t().contiguous().t() if layout == "transposed" else torch.nn.functional.pad(t, (0, 3))[:, : t.shape[1]]

    a, g, b = gated(dtypes)
    x, weight, bias, *_ = projected(dtypes)
    a, b, x = map(laid_out, (a, b, x))
    for op, eager, inputs in (
        (OPS.gated_add, eager_gated, (a, g, b)),
        (OPS.gate_projected_add, eager_projected, (x, weight, bias, a, b)),
    ):
        y, expected = op(*inputs), eager(*inputs)
        assert (y.dtype, y.stride()) == (expected.dtype, expected.stride())
        assert_no_worse(y, expected, eager(*doubled(*inputs)), projected_slack(x, weight, a, b))


@pytest.mark.parametrize("dtype", [None, BF16, F32], ids=named)
@pytest.mark.parametrize("dtypes", SOME, ids=named)
@pytest.mark.parametrize("name", ["gated_add", "gate_projected_add"])
def test_gradients(name, dtypes, dtype):
    """Each in the dtype of its own operand, no further from the truth than those of the nodes."""
    eager = {"gated_add": eager_gated, "gate_projected_add": eager_projected}[name]
    inputs = {"gated_add": gated, "gate_projected_add": projected}[name](dtypes)
    final = eager(*inputs).dtype if dtype is None else dtype
    dy = drawn(((5, 48), final), seed=1)[0]

    def gradients(function, inputs, dy):
        given = [t.detach().requires_grad_() for t in inputs]
        return torch.autograd.grad(function(*given), given, dy)

    got = gradients(lambda *given: getattr(OPS, name)(*given, dtype=dtype), inputs, dy)
    want = gradients(lambda *given: eager(*given).to(final), inputs, dy)
    truth = gradients(eager, doubled(*inputs), dy.double())
    for operand, g, w, t in zip(inputs, got, want, truth, strict=True):
        assert g.dtype == operand.dtype and g.shape == operand.shape
        # Half a unit of the largest gradient in its dtype, and of the logit, which the op rounds as the nodes do; and the
        # orders in which a row's 48 products are summed in float32: 6 roundings in a tree, one for each side's last.
        eps = torch.finfo(operand.dtype).eps + torch.finfo(dtypes[1]).eps + 8 * 2.0**-24
        assert_no_worse(g, w, t, eps * t.abs().max().item())


@pytest.mark.parametrize("dtypes", SOME[:4], ids=named)
def test_opcheck(dtypes):
    opcheck(OPS.gated_add.default, [t.requires_grad_() for t in gated(dtypes)], {"dtype": BF16})
    opcheck(OPS.gate_projected_add.default, [t.requires_grad_() for t in projected(dtypes)], {"dtype": F32})


def combine(a, b, gate, residual, weights=None, norm=None, columns=48):
    """Operands of moe_combine, of the dtypes given; top-2 where `weights` has one."""
    shapes = {"a": (10 if weights else 5, columns), "b": (5, columns), "residual": (5, columns)}
    wanted = {"a": a, "b": b, "residual": residual}
    if gate[0] == "x":
        shapes |= {"x": (5, 24), "gate_weight": (1, 24), "gate_bias": (1,)}
        wanted |= dict.fromkeys(("x", "gate_weight", "gate_bias"), gate[1])
    else:
        shapes, wanted = shapes | {"gate": (5, 1)}, wanted | {"gate": gate[1]}
    shapes |= {"topk_weights": (5, 2), "norm_weight": (columns,)}
    wanted |= {"topk_weights": weights, "norm_weight": norm}
    given = {name: drawn((shapes[name], dtype))[0] for name, dtype in wanted.items() if dtype is not None}
    return given | {"top_k": 2 if weights else 0, "eps": None if norm is None else 1e-6}


COMBINED = {
    "all bf16": (combine(BF16, BF16, ("gate", BF16), BF16, BF16, BF16), BF16),
    "float32 weights do not promote": (combine(BF16, BF16, ("x", BF16), BF16, F32, F32), BF16),
    "float32 residual": (combine(BF16, BF16, ("x", BF16), F32, None, F32), F32),
    "float32 residual, weights in fp16": (combine(BF16, BF16, ("gate", BF16), F32, F16, BF16), F32),
    "float32 gate": (combine(BF16, BF16, ("x", F32), None, None, None), F32),
    "float32 routed": (combine(F32, BF16, ("gate", BF16), BF16, None, BF16), F32),
    "float32 shared": (combine(F16, F32, ("x", F16), None, F16, F16), F32),
    "fp16 and bf16": (combine(F16, BF16, ("gate", BF16), BF16, BF16, None), F32),
}
combined = pytest.mark.parametrize(("options", "natural"), COMBINED.values(), ids=COMBINED)


def assert_combined(got, options, final):
    truth = moe_combine_expression(Arguments(**options), compute=torch.float64)
    for y, t in zip(got, truth, strict=True):
        assert y.dtype == final
        if t.numel():
            assert not y.isnan().any()
            # One rounding, and what fp32 itself adds: sums of 24 products and of 48 squares.
            allowed = (0.51 * torch.finfo(final).eps + 64 * 2.0**-24) * t.abs() + 2.0**-24 * 64
            assert ((y.double() - t).abs() <= allowed).all()


@results
@combined
def test_moe_combine(options, natural, dtype):
    final = natural if dtype is None else dtype
    assert_combined(OPS.moe_combine(**options, dtype=dtype), options, final)
    on_meta = {name: v.to("meta") if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    assert [y.dtype for y in OPS.moe_combine(**on_meta, dtype=dtype)] == [final, final]


@pytest.mark.parametrize("dtype", [None, BF16, F32], ids=named)
@combined
def test_moe_combine_where_autograd_records(options, natural, dtype):
    """The same dtypes; each gradient in that of its operand."""
    given = {n: v.detach().requires_grad_() if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    total, normed = OPS.moe_combine(**given, dtype=dtype)
    assert total.dtype == normed.dtype == (natural if dtype is None else dtype)
    (total.sum() + normed.sum()).backward()
    for value in given.values():
        if isinstance(value, torch.Tensor):
            assert value.grad.dtype == value.dtype and not value.grad.isnan().any()


def test_refused():
    a, g, b = gated((F32, F32, F32))
    with pytest.raises(RuntimeError, match="dtype is torch.float64, allowed: bfloat16, float16 or float32"):
        OPS.gated_add(a, g, b, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="gate_weight is torch.bfloat16, allowed: torch.float32 as x"):
        OPS.moe_combine(a, b, x=a, gate_weight=torch.ones(48, device=DEVICE, dtype=BF16))
    with pytest.raises(RuntimeError, match="b is torch.float64, allowed: bfloat16"):
        OPS.moe_combine(a, b.double(), gate=g)
