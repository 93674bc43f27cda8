"""The registered ops: opcheck, meta tensors, fresh results, and what they refuse."""

import ops_operands
import pytest
import torch
from ops_helpers import DEVICE, LAYOUTS, gated_expression
from ops_operands import F32, I64, gated_add_op, gated_operands, normal, projected_op, projected_operands
from torch.library import opcheck

from fusionpass import ops

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")  # NumPy, of inf and nan
implementation = ops_operands.implementation


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
