"""The registered ops and `ops.gated_add`: opcheck, refusals, gradients, transforms, `out=`, compilation, imports."""

import doctest
import os
import subprocess
import sys

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from ops_helpers import DEVICE, DTYPES, LAYOUTS, gated_expression, projected_expression
from torch.library import opcheck

from fusionpass import ops
from fusionpass.operators import implementations

gated_add_op = torch.ops.fusionpass.gated_add.default
projected_op = torch.ops.fusionpass.gate_projected_add.default
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")  # NumPy, of inf and nan
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(params=["kernel", "aten"])
def implementation(request, monkeypatch):
    """On a CPU: the Triton kernels under the interpreter, or the ATen implementation. On CUDA there is one."""
    if DEVICE == "cuda" and request.param == "aten":
        monkeypatch.setattr(sys.modules[__name__], "DEVICE", "cpu")
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


# opcheck: schema, autograd registration, the fake's metadata, the op inside AOTAutograd with dynamic shapes.


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "requires_grad"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_opcheck_gated_add(implementation, name, requires_grad):
    make, lay = normal(requires_grad=requires_grad), LAYOUTS[name]
    opcheck(gated_add_op, (lay(make, (4, 8)), make((4, 1)), lay(make, (4, 8))))
    opcheck(gated_add_op, (make((4, 8)), lay(make, (4, 8)), make((4, 8))), {"numerics": "eager"})


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "requires_grad"])
@pytest.mark.parametrize("gate", [(4, 1), (8,), (1,), (2, 1, 1), (2, 4, 8)], ids=str)
def test_opcheck_gate_shapes(implementation, gate, requires_grad):
    opcheck(gated_add_op, gated_operands(shape=(2, 4, 8), gate=gate, requires_grad=requires_grad))


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "requires_grad"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_opcheck_gate_projected_add(implementation, name, requires_grad):
    make, lay = normal(requires_grad=requires_grad), LAYOUTS[name]
    opcheck(projected_op, (lay(make, (4, 6)), lay(make, (1, 6)), None, make((4, 8)), make((4, 8))))
    opcheck(projected_op, (make((4, 6)), make((6, 1)), make((1,)), lay(make, (4, 8)), lay(make, (4, 8))))


def test_opcheck_out(implementation):
    a, gate, b = gated_operands()
    opcheck(torch.ops.fusionpass._gated_add_out.default, (a, gate, b, torch.empty_like(a)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_opcheck_16_bit(implementation, dtype):
    opcheck(gated_add_op, gated_operands(dtype, requires_grad=True))
    opcheck(projected_op, projected_operands(dtype, requires_grad=True))


def test_the_result_is_fresh(implementation):
    a, gate, b = gated_operands()
    for y in (gated_add_op(a, gate, b), ops.gated_add(a, gate, b), projected_op(a, b[:1], None, a, b)):
        assert y.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in (a, gate, b)}


def test_meta_tensors():
    a, gate, b = (t.to("meta") for t in gated_operands())
    y = gated_add_op(a.t(), gate.expand(4, 8).t(), b.t())
    assert y.is_meta and y.stride() == gated_expression(a.t(), gate.expand(4, 8).t(), b.t()).stride()
    assert ops.gated_add(a, gate, b, out=a) is a
    x, weight, bias, a, b = (t.to("meta") for t in projected_operands())
    assert projected_op(x, weight, bias, a, b).shape == a.shape


# Refusals of the registered ops.

F32, I64 = torch.float32, torch.int64
GATED_REFUSALS = {
    "b's shape": (((4, 8), F32), ((4, 1), F32), ((4, 1), F32), {}, r"b is \[4, 1\], allowed: \[4, 8\] as a"),
    "a broadcasts": (((8,), F32), ((4, 1), F32), ((4, 8), F32), {}, r"b is \[4, 8\], allowed: \[8\] as a"),
    "gate too long": (((4, 8), F32), ((3, 1), F32), ((4, 8), F32), {}, r"gate is \[3, 1\], allowed: any shape"),
    "gate per row": (((4, 8), F32), ((4,), F32), ((4, 8), F32), {}, r"gate is \[4\], allowed: any shape"),
    "gate's dims": (((4, 8), F32), ((1, 4, 8), F32), ((4, 8), F32), {}, r"gate is \[1, 4, 8\]"),
    "gate grows": (((4, 1), F32), ((4, 8), F32), ((4, 1), F32), {}, r"gate is \[4, 8\]"),
    "0-d gate": (((4, 8), F32), ((), F32), ((4, 8), F32), {}, "gate has no dims"),
    "0-d a": (((), F32), ((), F32), ((), F32), {}, "a has no dims"),
    "mixed dtypes": (
        ((4, 8), F32),
        ((4, 1), torch.float16),
        ((4, 8), F32),
        {"numerics": "eager"},
        "gate is torch.float16, allowed: torch.float32 as a where numerics is 'eager'",
    ),
    "eager's result": (
        ((4, 8), F32),
        ((4, 1), F32),
        ((4, 8), F32),
        {"numerics": "eager", "dtype": torch.bfloat16},
        "dtype is torch.bfloat16, allowed: torch.float32 as a where numerics is 'eager'",
    ),
    "dtype": (((4, 8), F32), ((4, 1), F32), ((4, 8), F32), {"dtype": I64}, "dtype is torch.int64, allowed: bfloat16"),
    "float64": (((4, 8), torch.float64), ((4, 1), F32), ((4, 8), F32), {}, "a is torch.float64, allowed: bfloat16"),
    "int": (((4, 8), F32), ((4, 1), F32), ((4, 8), I64), {}, "b is torch.int64, allowed: bfloat16"),
    "numerics": (
        ((4, 8), F32),
        ((4, 1), F32),
        ((4, 8), F32),
        {"numerics": "fast"},
        "numerics is 'fast', allowed: 'fp32'",
    ),
}


@pytest.mark.parametrize("device", [DEVICE, "meta"])
@pytest.mark.parametrize(("a", "gate", "b", "options", "message"), GATED_REFUSALS.values(), ids=GATED_REFUSALS)
def test_gated_add_refuses(device, a, gate, b, options, message):
    tensors = [torch.ones(shape, device=device).to(dtype) for shape, dtype in (a, gate, b)]
    with pytest.raises(RuntimeError, match="fusionpass::gated_add: " + message):
        gated_add_op(*tensors, **options)


PROJECTED_REFUSALS = {
    "rows": ((3, 6), (1, 6), (1,), (4, 8), (4, 8), r"x is \[3, 6\], allowed: as many rows as a, which is \[4, 8\]"),
    "weight": ((4, 6), (2, 6), (1,), (4, 8), (4, 8), r"weight is \[2, 6\], allowed: \[1, 6\], \[6, 1\] or \[6\]"),
    "weight's K": ((4, 6), (1, 8), (1,), (4, 8), (4, 8), r"weight is \[1, 8\]"),
    "bias": ((4, 6), (1, 6), (2,), (4, 8), (4, 8), r"bias is \[2\], allowed: one element"),
    "b": ((4, 6), (1, 6), (1,), (4, 8), (4, 1), r"b is \[4, 1\], allowed: \[4, 8\]"),
    "0-d x": ((), (1, 1), (1,), (1,), (1,), "x has no dims"),
}


@pytest.mark.parametrize("device", [DEVICE, "meta"])
@pytest.mark.parametrize(
    ("x", "weight", "bias", "a", "b", "message"), PROJECTED_REFUSALS.values(), ids=PROJECTED_REFUSALS
)
def test_gate_projected_add_refuses(device, x, weight, bias, a, b, message):
    tensors = [torch.ones(shape, device=device) for shape in (x, weight, bias, a, b)]
    with pytest.raises(RuntimeError, match="fusionpass::gate_projected_add: " + message):
        projected_op(*tensors)


def test_gate_projected_add_refuses_a_projection_of_mixed_dtypes():
    x, weight, bias, a, b = projected_operands()
    for bad in ((x.half(), weight, bias, a, b), (x, weight, bias.double(), a, b), (x, weight, bias.bfloat16(), a, b)):
        with pytest.raises(RuntimeError, match="allowed: "):
            projected_op(*bad)


@pytest.mark.skipif(DEVICE == "cpu", reason="two devices with memory are needed")
def test_devices_are_not_mixed():
    a, gate, b = gated_operands()
    with pytest.raises(RuntimeError, match="gate is on cpu, allowed: cuda"):
        gated_add_op(a, gate.cpu(), b)
    with pytest.raises(ValueError, match="gate is on cpu, allowed: cuda"):
        ops.gated_add(a, gate.cpu(), b)


# Gradients.


def gradients(function, inputs, dy, create_graph=False):
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    return torch.autograd.grad(function(*inputs), wanted, dy, create_graph=create_graph)


GATES = [(2, 4, 1), (2, 4, 8), (8,), (1,), (2, 1, 1), (1, 4, 8)]


@dtypes
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_gated_add_gradients_round_once(implementation, dtype, gate):
    inputs = gated_operands(dtype, (2, 4, 8), gate, requires_grad=True)
    dy = normal(dtype, 1)((2, 4, 8))
    truths = gradients(gated_expression, [t.detach().double().requires_grad_() for t in inputs], dy.double())
    for got, tensor, truth in zip(gradients(gated_add_op, inputs, dy), inputs, truths, strict=True):
        assert got.shape == tensor.shape and got.dtype == dtype
        # Half a unit in the last place for the one rounding, and fp32 sums of up to 64 terms of size up to 10.
        torch.testing.assert_close(got.double(), truth, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-5)


@dtypes
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_eager_numerics_have_eagers_gradients(implementation, dtype, gate):
    inputs = gated_operands(dtype, (2, 4, 8), gate, requires_grad=True)
    dy = normal(dtype, 1)((2, 4, 8))
    got = gradients(lambda a, g, b: gated_add_op(a, g, b, numerics="eager"), inputs, dy)
    for mine, eagers in zip(got, gradients(gated_expression, inputs, dy), strict=True):
        assert torch.equal(mine, eagers)


@dtypes
@pytest.mark.parametrize("bias", [None, (1,), ()], ids=["no bias", "[1]", "[]"])
@pytest.mark.parametrize("weight", [(1, 6), (6, 1), (6,)], ids=str)
def test_gate_projected_add_gradients(implementation, dtype, weight, bias):
    inputs = projected_operands(dtype, weight, bias, requires_grad=True, rows=(2, 3))
    dy = normal(dtype, 1)((2, 3, 8))
    doubles = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    truths = gradients(projected_expression, doubles, dy.double())
    tensors = [t for t in inputs if t is not None]
    for got, tensor, truth in zip(gradients(projected_op, inputs, dy), tensors, truths, strict=True):
        assert got.shape == tensor.shape and got.dtype == dtype
        # The logit is recomputed in the dtype: half a unit of a logit of size up to 8, through sums of up to 48 terms.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), truth, rtol=4 * eps, atol=8 * eps * truth.abs().max().item())


@pytest.mark.parametrize("wanted", range(3), ids=["a", "gate", "b"])
def test_gated_add_gradient_of_one_input(implementation, wanted):
    inputs = gated_operands()
    inputs[wanted].requires_grad_()
    gated_add_op(*inputs).sum().backward()
    assert [t.grad is not None for t in inputs] == [i == wanted for i in range(3)]


@pytest.mark.parametrize("wanted", range(5), ids=["x", "weight", "bias", "a", "b"])
def test_gate_projected_add_gradient_of_one_input(implementation, wanted):
    inputs = projected_operands()
    inputs[wanted].requires_grad_()
    projected_op(*inputs).sum().backward()
    assert [t.grad is not None for t in inputs] == [i == wanted for i in range(5)]


def saved(function, inputs, wanted):
    """Addresses of what the backward of `function` keeps alive."""
    kept = []
    for i, t in enumerate(inputs):
        t.requires_grad_(i in wanted)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        function(*inputs)
    return kept


@pytest.mark.parametrize(("wanted", "kept"), [((0,), ""), ((1,), "-b"), ((2,), "-"), ((0, 1, 2), "-b")], ids=str)
def test_gated_add_saves_no_more_than_its_gradients_read(implementation, wanted, kept):
    """What it keeps of the gate is memory of its own, as the sigmoid is that the unfused nodes keep."""
    a, gate, b = gated_operands()
    names = {a.data_ptr(): "a", gate.data_ptr(): "g", b.data_ptr(): "b"}
    addresses = saved(gated_add_op, (a, gate, b), wanted)
    assert "".join(names.get(address, "-") for address in addresses) == kept


SAVED_OF_PROJECTED = [
    ((3,), ""),
    ((4,), "l"),
    ((0,), "wlb"),
    ((2,), "lb"),
    ((1, 3), "xlb"),
    ((0, 2, 3, 4), "wlb"),  # a frozen weight: x, the largest, is let go
    ((0, 1, 2, 3, 4), "xwlb"),
]


@pytest.mark.parametrize(("wanted", "kept"), SAVED_OF_PROJECTED, ids=str)
def test_gate_projected_add_saves_no_more_than_its_gradients_read(implementation, wanted, kept):
    """As eager, with the logit, which is new memory, for its sigmoid; the bias is read by none."""
    operands = projected_operands()
    names = {t.data_ptr(): name for t, name in zip(operands, "xwiab", strict=True)}
    assert "".join(names.get(address, "l") for address in saved(projected_op, operands, wanted)) == kept


def test_gradient_of_a_is_the_incoming_one(implementation):
    from fusionpass.kernels.gate_projected_add_aten import gate_projected_add_gradients
    from fusionpass.kernels.gated_add_aten import gated_add_gradients

    a, gate, b = gated_operands()
    x, weight, *_ = projected_operands()
    dy = torch.ones_like(a)
    assert gated_add_gradients(dy, gate, b, "fp32", (True, True, True))[0] is dy
    assert gate_projected_add_gradients(dy, None, x, weight, gate, b, (True,) * 5)[3] is dy


@pytest.mark.parametrize("rows", [0, 1])
def test_gradients_of_few_rows(implementation, rows):
    inputs = gated_operands(shape=(rows, 8), gate=(rows, 1), requires_grad=True)
    assert [tuple(g.shape) for g in gradients(gated_add_op, inputs, torch.ones(rows, 8, device=DEVICE))] == [
        tuple(t.shape) for t in inputs
    ]
    inputs = projected_operands(requires_grad=True, rows=(rows,))
    assert [tuple(g.shape) for g in gradients(projected_op, inputs, torch.ones(rows, 8, device=DEVICE))] == [
        tuple(t.shape) for t in inputs
    ]


def second_order(function, inputs, dy):
    first = gradients(function, inputs, dy, create_graph=True)
    wanted = [t for t in (*inputs, dy) if t is not None]
    return torch.autograd.grad(sum(g.pow(2).sum() for g in first), wanted, allow_unused=True)


@pytest.mark.parametrize("numerics", ["fp32", "eager"])
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_double_backward_of_gated_add(implementation, gate, numerics):
    inputs = gated_operands(shape=(2, 4, 8), gate=gate, requires_grad=True)
    dy = normal(seed=1, requires_grad=True)((2, 4, 8))
    got = second_order(lambda a, g, b: gated_add_op(a, g, b, numerics=numerics), inputs, dy)
    for mine, eagers in zip(got, second_order(gated_expression, inputs, dy), strict=True):
        torch.testing.assert_close(mine, eagers)


def test_double_backward_of_gate_projected_add(implementation):
    inputs, dy = projected_operands(requires_grad=True), normal(seed=1, requires_grad=True)((4, 8))
    for mine, eagers in zip(
        second_order(projected_op, inputs, dy), second_order(projected_expression, inputs, dy), strict=True
    ):
        torch.testing.assert_close(mine, eagers)


# Transforms. An op without a forward-mode rule gives a zero tangent and no error: these must be right or raise.


@pytest.mark.parametrize("numerics", ["fp32", "eager"])
def test_forward_mode(implementation, numerics):
    inputs = gated_operands()
    tangents = tuple(normal(seed=i + 1)(t.shape) for i, t in enumerate(inputs))

    def op(a, gate, b):
        return gated_add_op(a, gate, b, numerics=numerics)

    for got, expected in zip(
        torch.func.jvp(op, inputs, tangents), torch.func.jvp(gated_expression, inputs, tangents), strict=True
    ):
        torch.testing.assert_close(got, expected)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, tangent) for t, tangent in zip(inputs, tangents, strict=True)]
        for only in range(3):
            mixed = [dual if i == only else t for i, (dual, t) in enumerate(zip(duals, inputs, strict=True))]
            got, expected = (forward_ad.unpack_dual(f(*mixed)).tangent for f in (op, gated_expression))
            torch.testing.assert_close(got, expected)


def test_forward_mode_of_gate_projected_add(implementation):
    inputs = projected_operands()
    tangents = tuple(normal(seed=i + 1)(t.shape) for i, t in enumerate(inputs))
    for got, expected in zip(
        torch.func.jvp(projected_op, inputs, tangents),
        torch.func.jvp(projected_expression, inputs, tangents),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, *x: torch.func.grad(lambda *x: f(*x).pow(2).sum(), argnums=(0, 1, 2))(*x),
        lambda f, *x: torch.func.jacrev(f, argnums=1)(*x),
        lambda f, *x: torch.func.jacfwd(f, argnums=1)(*x),
        lambda f, *x: torch.func.hessian(lambda gate: f(x[0], gate, x[2]).pow(2).sum())(x[1]),
        lambda f, *x: torch.vmap(f)(*x),
        lambda f, *x: torch.vmap(torch.func.grad(lambda *x: f(*x).pow(2).sum(), argnums=(0, 1, 2)))(*x),
    ],
    ids=["grad", "jacrev", "jacfwd", "hessian", "vmap", "vmap of grad"],
)
def test_transforms(implementation, transform):
    inputs = gated_operands(shape=(2, 3, 4), gate=(2, 3, 1))
    torch.testing.assert_close(transform(gated_add_op, *inputs), transform(gated_expression, *inputs))


# The public function.


@dtypes
@pytest.mark.parametrize("shape", [(4, 8), (8, 8), (2, 4, 8), (8,), (0, 8), (4, 1), (1, 1)], ids=str)
def test_public_gate_shapes(implementation, dtype, shape):
    """[...] and [..., 1] are one logit per row also where the number of rows equals H."""
    a, gate, b = gated_operands(dtype, shape, shape)
    per_row = gate[..., :1]
    expected = gated_add_op(a, per_row, b)
    assert torch.equal(ops.gated_add(a, per_row, b), expected)
    assert torch.equal(ops.gated_add(a, per_row.squeeze(-1), b), expected)
    assert torch.equal(ops.gated_add(a, gate, b), gated_add_op(a, gate, b))
    if shape == (8, 8):
        assert not torch.equal(expected, gated_expression(a, per_row.squeeze(-1), b))


def ones(*shape, dtype=F32):
    return torch.ones(shape, dtype=dtype, device=DEVICE)


PUBLIC_REFUSALS = {
    "gate [H]": (
        lambda: (ones(4, 8), ones(8), ones(4, 8)),
        ValueError,
        r"gate is \[8\], allowed: \[4\] or \[4, 1\] or",
    ),
    "gate [1, 1]": (lambda: (ones(4, 8), ones(1, 1), ones(4, 8)), ValueError, r"gate is \[1, 1\]"),
    "gate [1, H]": (lambda: (ones(4, 8), ones(1, 8), ones(4, 8)), ValueError, r"gate is \[1, 8\]"),
    "gate 0-d": (lambda: (ones(4, 8), ones(), ones(4, 8)), ValueError, r"gate is \[\]"),
    "gate's rows": (lambda: (ones(4, 8), ones(3, 1), ones(4, 8)), ValueError, r"gate is \[3, 1\]"),
    "gate's dims": (lambda: (ones(4, 8), ones(1, 4, 8), ones(4, 8)), ValueError, r"gate is \[1, 4, 8\]"),
    "b's shape": (lambda: (ones(4, 8), ones(4, 1), ones(4, 7)), ValueError, r"b is \[4, 7\], allowed: \[4, 8\]"),
    "b's dims": (lambda: (ones(4, 8), ones(4, 1), ones(1, 4, 8)), ValueError, r"b is \[1, 4, 8\]"),
    "a 0-d": (lambda: (ones(), ones(), ones()), ValueError, "a has no dims"),
    "a number": (lambda: (1.0, ones(4, 1), ones(4, 8)), TypeError, "a is float, allowed: torch.Tensor"),
    "None": (lambda: (ones(4, 8), None, ones(4, 8)), TypeError, "gate is NoneType"),
    "float64": (lambda: (ones(4, 8, dtype=torch.float64),) * 3, ValueError, "a is torch.float64, allowed: bfloat16"),
    "int": (lambda: (ones(4, 8), ones(4, 1), ones(4, 8, dtype=I64)), ValueError, "b is torch.int64"),
    "complex": (lambda: (ones(4, 8, dtype=torch.complex64),) * 3, ValueError, "a is torch.complex64"),
    "mixed": (
        lambda: (ones(4, 8), ones(4, 1).half(), ones(4, 8)),
        ValueError,
        "gate is torch.float16, allowed: torch.fl",
    ),
    "sparse": (lambda: (ones(4, 8), ones(4, 1), ones(4, 8).to_sparse()), ValueError, "b has layout torch.sparse_coo"),
    "meta": (lambda: (ones(4, 8), ones(4, 1), ones(4, 8).to("meta")), ValueError, "b is on meta, allowed: "),
}


@pytest.mark.parametrize(("operands", "error", "message"), PUBLIC_REFUSALS.values(), ids=PUBLIC_REFUSALS)
def test_public_refuses(operands, error, message):
    out = torch.full((4, 8), 77.0, device=DEVICE)
    for options in ({}, {"out": out}):
        with pytest.raises(error, match="gated_add: " + message):
            ops.gated_add(*operands(), **options)
    assert (out == 77.0).all()


def test_docstring_example():
    assert doctest.testmod(ops).failed == 0


# out=


def parts(width=8, rows=4):
    """One buffer with columns for a, b, a full gate and more."""
    buffer = normal()((rows, 4 * width))
    return buffer, *buffer.split(width, 1)


OUTS = {
    "new": lambda a, gate, b: torch.full_like(a, float("nan")),
    "a": lambda a, gate, b: a,
    "b": lambda a, gate, b: b,
    "padded rows": lambda a, gate, b: torch.full((4, 11), float("nan"), device=DEVICE)[:, :8],
    "transposed": lambda a, gate, b: torch.full((8, 4), float("nan"), device=DEVICE).t(),
    "every second column": lambda a, gate, b: torch.full((4, 16), float("nan"), device=DEVICE)[:, 1::2],
}


@pytest.mark.parametrize("gate", [(4,), (4, 1), (4, 8)], ids=str)
@pytest.mark.parametrize("name", OUTS)
def test_out(implementation, name, gate):
    a, gate, b = gated_operands(gate=gate)
    expected = ops.gated_add(a, gate, b)
    out = OUTS[name](a, gate, b)
    before = out._version, out.data_ptr(), out.stride()
    assert ops.gated_add(a, gate, b, out=out) is out
    assert torch.equal(out, expected)
    assert (out.data_ptr(), out.stride()) == before[1:]
    assert out._version > before[0]


SHARED_OUTS = {
    "halves of one buffer": lambda buffer, a, b, gate, rest: (a, gate, b, rest),
    "the full gate itself": lambda buffer, a, b, gate, rest: (a, gate, b, gate),
    "gate is a column beside out": lambda buffer, a, b, gate, rest: (a, gate[:, :1], b, rest),
    "interleaved with a": lambda buffer, a, b, gate, rest: (buffer[:, 0:7], rest[:, :1], rest[:, :7], buffer[:, 7:14]),
    "other rows": lambda buffer, a, b, gate, rest: (
        buffer[:2],
        buffer[:2, 3:4].clone(),
        buffer[:2].clone(),
        buffer[2:],
    ),
    "a and b are one": lambda buffer, a, b, gate, rest: (a, gate, a, a),
    "3-d halves": lambda buffer, a, b, gate, rest: tuple(t.unflatten(0, (2, 2)) for t in (a, gate, b, rest)),
}


@pytest.mark.parametrize("name", SHARED_OUTS)
def test_out_may_share_a_buffer_without_common_elements(implementation, name):
    a, gate, b, out = SHARED_OUTS[name](*parts())
    expected = ops.gated_add(a, gate, b)
    assert torch.equal(ops.gated_add(a, gate, b, out=out), expected)


OVERLAPPING_OUTS = {
    "gate is a column of out": (
        lambda buffer, a, b, gate, rest: (a, rest[:, 3:4], b, rest),
        "out shares memory with gate",
    ),
    "shifted columns of a": (lambda buffer, a, b, gate, rest: (buffer[:, :8], gate, b, buffer[:, 1:9]), "with a"),
    "shifted rows of b": (lambda buffer, a, b, gate, rest: (a[1:], gate[1:], b[1:], b[:-1]), "with b"),
    "transposed a": (lambda buffer, *_: (buffer[:, :4], buffer[:, 8:9], buffer[:, 4:8], buffer[:, :4].t()), "with a"),
    "expanded": (lambda buffer, a, b, gate, rest: (a, gate, b, rest[:1].expand(4, 8)), "out has shape .* and strides"),
    "rows that overlap": (
        lambda buffer, a, b, gate, rest: (a, gate, b, torch.zeros(64, device=DEVICE).as_strided((4, 8), (4, 1))),
        "out has shape .* and strides",
    ),
    "dtype": (
        lambda buffer, a, b, gate, rest: (a, gate, b, rest.half()),
        "out is torch.float16, allowed: torch.float32",
    ),
    "shape": (lambda buffer, a, b, gate, rest: (a, gate, b, rest[:, :7]), r"out is \[4, 7\], allowed: \[4, 8\]"),
    "broadcast": (lambda buffer, a, b, gate, rest: (a, gate, b, rest[None]), r"out is \[1, 4, 8\], allowed: \[4, 8\]"),
    "device": (lambda buffer, a, b, gate, rest: (a, gate, b, rest.to("meta")), "out is on meta"),
}


@pytest.mark.parametrize(("operands", "message"), OVERLAPPING_OUTS.values(), ids=OVERLAPPING_OUTS)
def test_out_refused(operands, message):
    buffer, *rest = parts()
    before = buffer.clone()
    a, gate, b, out = operands(buffer, *rest)
    with pytest.raises(ValueError, match="gated_add: .*" + message):
        ops.gated_add(a, gate, b, out=out)
    assert torch.equal(buffer, before)


def test_out_is_not_a_tensor():
    with pytest.raises(TypeError, match="out is list"):
        ops.gated_add(*gated_operands(), out=[])


def test_out_and_autograd(implementation):
    a, gate, b = gated_operands()
    b.requires_grad_()
    out = torch.zeros_like(a)
    with pytest.raises(ValueError, match="use out=None"):
        ops.gated_add(a, gate, b, out=out)
    with pytest.raises(ValueError, match="use out=None"):
        ops.gated_add(a, gate, b.detach(), out=torch.zeros_like(a).requires_grad_())
    assert (out == 0).all()
    with torch.no_grad():
        assert ops.gated_add(a, gate, b, out=out) is out
    with torch.inference_mode():
        made = torch.zeros_like(a)
        assert ops.gated_add(a, gate, b, out=made) is made


def test_out_invalidates_what_autograd_saved(implementation):
    a, gate, b = gated_operands()
    leaf = torch.ones_like(a).requires_grad_()
    saved = leaf * 1.0
    y = saved.exp()  # saves its result
    with torch.no_grad():
        ops.gated_add(a, gate, b, out=y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_out_refuses_transforms(implementation):
    a, gate, b = gated_operands()
    out = torch.zeros_like(a)
    with pytest.raises(ValueError, match="forward-mode"):
        torch.func.jvp(lambda a: ops.gated_add(a, gate, b, out=out), (a,), (b,))


# Under torch.compile and other tracers.


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_once_for_several_sizes(implementation, backend):
    compiles = []

    def counting(graph, inputs):
        compiles.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    def function(x, weight, a, gate, b, out):
        y = projected_op(x, weight, None, ops.gated_add(a, gate, b), b)
        return gated_add_op(ops.gated_add(y, gate[:, 0], b, out=out), gate, a, numerics="eager")

    compiled = torch.compile(function, backend=counting, fullgraph=True, dynamic=True)
    for rows in (5, 7, 11, 6):
        make = normal(seed=rows)
        x, weight, a, gate, b = make((rows, 6)), make((1, 6)), make((rows, 8)), make((rows, 1)), make((rows, 8))
        outs = torch.zeros_like(a), torch.zeros_like(a)
        torch.testing.assert_close(compiled(x, weight, a, gate, b, outs[0]), function(x, weight, a, gate, b, outs[1]))
        torch.testing.assert_close(*outs)
    assert len(compiles) == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training(implementation, backend):
    inputs = projected_operands(requires_grad=True)
    gate = normal(requires_grad=True)((4, 1))

    def function(x, weight, bias, a, b, gate):
        return gated_add_op(projected_op(x, weight, bias, a, b), gate, b)

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    dy = normal(seed=1)((4, 8))
    got, expected = (gradients(f, (*inputs, gate), dy) for f in (compiled, function))
    torch.testing.assert_close(got, expected)


def test_out_in_place_compiled(implementation):
    compiled = torch.compile(lambda a, gate, b: ops.gated_add(a, gate, b, out=a), backend="aot_eager", fullgraph=True)
    a, gate, b = gated_operands()
    expected = ops.gated_add(a, gate, b)
    assert torch.equal(compiled(a, gate, b), expected)
    assert torch.equal(a, expected)


def test_make_fx_records_the_ops():
    from torch.fx.experimental.proxy_tensor import make_fx

    a, gate, b = gated_operands()
    graph = make_fx(lambda a, gate, b: ops.gated_add(a, gate, b, out=torch.empty_like(a)))(a, gate, b)
    targets = [node.target for node in graph.graph.nodes]
    assert torch.ops.fusionpass._gated_add_out.default in targets
    assert torch.equal(graph(a, gate, b), ops.gated_add(a, gate, b))


def test_exported_as_one_node():
    class Module(torch.nn.Module):
        def forward(self, a, gate, b):
            return ops.gated_add(a, gate, b)

    inputs = gated_operands()
    program = torch.export.export(Module(), inputs)
    for graph in (program.graph, program.run_decompositions().graph):
        assert [n.target for n in graph.nodes if n.op == "call_function"] == [gated_add_op]
    assert torch.equal(program.module()(*inputs), ops.gated_add(*inputs))


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need CUDA")
def test_cuda_graph_capture():
    x, weight, bias, a, b = projected_operands(torch.bfloat16)
    gate = normal(torch.bfloat16)((4, 1))

    def run():
        return gated_add_op(projected_op(x, weight, bias, a, b), gate, b)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    a.add_(1.0)
    graph.replay()
    assert torch.equal(y, run())


# What importing costs.


def test_import_loads_neither_triton_nor_transformers():
    code = (
        "import sys, torch, fusionpass;"
        "a = torch.ones(2, 3); fusionpass.ops.gated_add(a, a[:, :1], a);"
        "print(sorted({'triton', 'transformers', 'kernels'} & set(sys.modules)))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
