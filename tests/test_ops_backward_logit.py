"""`_gate_projected_add_and_logit`, the forward op that keeps the logit."""

import ops_backward_helpers
import pytest
import torch
from ops_backward_helpers import (
    MANY,
    biases,
    double,
    dtypes,
    forward_operands,
    logit_error,
    normal,
    projected_and_logit,
    projected_op,
    projection,
)
from ops_helpers import LAYOUTS, forget_calls, record_launches

from fusionpass.kernels import gate_projected_add as forward_kernel

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")  # NumPy, of inf and nan
nan_filled = ops_backward_helpers.nan_filled
implementation = ops_backward_helpers.implementation


def check_and_logit(x, weight, bias, a, b):
    y, logit = projected_and_logit(x, weight, bias, a, b)
    alone = projected_op(x, weight, bias, a, b)
    assert torch.equal(y, alone) and y.stride() == alone.stride()
    assert logit.shape == (*a.shape[:-1], 1) and logit.dtype == a.dtype and logit.is_contiguous()
    truth = projection(*map(double, (x, weight, bias))).reshape(logit.shape)
    if logit.numel():
        error, allowed = (logit.double() - truth).abs(), (truth.to(a.dtype).double() - truth).abs()
        assert (error <= allowed + 2 * logit_error(x, weight, bias)).all()  # and so it is no nan either


FEW = forward_kernel.SPLITS[0][0]  # rows
LOGIT_SHAPES = {  # rows, K, H
    "one row": ((1,), 64, 64),
    "few rows, some programs each": ((FEW,), 7, 300),
    "H of fewer than the programs": ((2,), 300, 3),
    "one row more": ((FEW + 1,), 7, 300),
    "many rows": ((2, MANY // 2), 7, 64),
    "no leading dims": ((), 8, 8),
    "no rows": ((0,), 8, 8),
    "no columns": ((4,), 8, 0),
}


@dtypes
@biases
@pytest.mark.parametrize(("rows", "k", "h"), LOGIT_SHAPES.values(), ids=LOGIT_SHAPES)
def test_the_logit_beside_the_result(nan_filled, implementation, dtype, bias, rows, k, h):
    check_and_logit(*forward_operands(normal(dtype), rows=rows, k=k, h=h, bias=bias))


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_logit_of_other_layouts(nan_filled, implementation, name):
    make, lay = normal(torch.bfloat16), LAYOUTS[name]
    x, weight, bias, a, b = forward_operands(make, rows=(9,))
    check_and_logit(lay(make, x.shape), weight, bias, a, b)
    check_and_logit(x, lay(make, weight.shape), bias, a, b)
    check_and_logit(x, weight, bias, lay(make, a.shape), lay(make, b.shape))


@pytest.mark.parametrize("part", ["x", "a", "b", "x and a", "a transposed"])
@pytest.mark.parametrize("sizes", [(3, 2, 10), (2, 3, 6)], ids=["many rows", "few rows"])
def test_logits_of_several_launches(monkeypatch, nan_filled, part, sizes):
    """Leading dims that do not collapse: each launch starts at an offset of its own, in the logits another one."""
    make = normal()
    n, m, wide = sizes
    rows = (n, m * (2 if n == 3 else 1))
    x, weight, bias, a, b = forward_operands(make, rows=rows)

    def padded(t):
        return make((t.shape[0], t.shape[1] + wide, t.shape[2]))[:, : t.shape[1]]

    if "x" in part:
        x = padded(x)
    if part in ("a", "x and a"):
        a = padded(a)
    if part == "b":
        b = padded(b)
    if part == "a transposed":
        a = make((a.shape[1], a.shape[0], a.shape[2])).transpose(0, 1)
    recorded = record_launches(monkeypatch, forward_kernel)
    check_and_logit(x, weight, bias, a, b)
    assert len([launch for launch in recorded if launch.arguments["KEEP_LOGIT"]]) > 1


@pytest.mark.parametrize("rows", [3, 40])
def test_logits_of_launches_as_large_as_a_grid_may_be(monkeypatch, nan_filled, rows):
    monkeypatch.setattr(forward_kernel, "GRID_LIMIT", 9)
    recorded = record_launches(monkeypatch, forward_kernel)
    check_and_logit(*forward_operands(normal(), rows=(rows,)))
    blocks = [launch.blocks for launch in recorded if launch.arguments["KEEP_LOGIT"]]
    assert len(blocks) > 1 and max(blocks) <= 9


def test_calls_that_keep_the_logit_are_told_apart(monkeypatch):
    forget_calls(monkeypatch, forward_kernel)
    for _ in range(2):
        for dtype in (torch.float32, torch.bfloat16):
            for rows, h in (((2,), 8), ((2,), 9), ((1, 2), 8)):
                for bias in (None, (1,)):
                    check_and_logit(*forward_operands(normal(dtype), rows=rows, h=h, bias=bias))
    assert len(forward_kernel._with_logit) == len(forward_kernel._fresh) == 2 * 3 * 2


def test_the_logit_op_refuses_what_the_op_refuses(implementation):
    x, weight, bias, a, b = forward_operands(normal())
    with pytest.raises(RuntimeError, match=r"b is \[4, 7\], allowed: \[4, 8\] as a"):
        projected_and_logit(x, weight, bias, a, b[:, :7])
    with pytest.raises(RuntimeError, match="weight is"):
        projected_and_logit(x, weight[:, :5], bias, a, b)
