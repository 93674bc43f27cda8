"""`_gated_add_backward` and `_gate_projected_add_backward`: their kernels, layouts these do not take, special values."""

import ops_backward_helpers
import pytest
import torch
from ops_backward_helpers import (
    MANY,
    backward_operands,
    biases,
    check_gated,
    check_projected,
    check_projected_autograd,
    dtypes,
    gated_backward,
    gradients,
    gradients_from_logit,
    logit_of,
    normal,
    projected_backward,
    projected_operands,
)
from ops_helpers import DEVICE, forget_calls, gated_expression, record_launches

from fusionpass.kernels import gate_projected_add_backward as projected_kernel
from fusionpass.kernels import gated_add_backward as gated_kernel

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")  # NumPy, of inf and nan
nan_filled = ops_backward_helpers.nan_filled


def test_fresh_memory_is_nan(nan_filled):
    assert all(t.isnan().all() for t in (torch.empty(3), torch.empty_like(torch.zeros(3))))


GATED_SHAPES = [(1, 1), (5, 7), (2, 64), (MANY, 64), (2, 3, 300), (1, 1023), (2, 3000), (1, 8192), (64,), (3, 1)]


@dtypes
@pytest.mark.parametrize("shape", GATED_SHAPES, ids=str)
def test_gated_add_backward(nan_filled, dtype, shape):
    make = normal(dtype)
    dy, gate, b = make(shape), make((*shape[:-1], 1)), make(shape)
    assert gated_kernel.fits(dy, gate, b)
    check_gated(dy, gate, b)


PROJECTED_SHAPES = {  # rows, K, H
    "one row": ((1,), 64, 64),
    "K < H": ((2,), 7, 300),
    "K > H": ((5,), 300, 7),
    "3-d, H 1": ((2, 3), 64, 1),
    "K 1": ((3,), 1, 64),
    "many rows": ((MANY,), 7, 64),
    "odd": ((2,), 1023, 65),
    "wide": ((3,), 64, 3000),
    "no leading dims": ((), 8, 8),
}


@dtypes
@biases
@pytest.mark.parametrize(("rows", "k", "h"), PROJECTED_SHAPES.values(), ids=PROJECTED_SHAPES)
def test_gate_projected_add_backward(nan_filled, dtype, bias, rows, k, h):
    dy, x, weight, bias, b = projected_operands(normal(dtype), rows, k, h, bias)
    assert projected_kernel.fits(*backward_operands(dy, x, weight, bias, b)[:5])
    check_projected(dy, x, weight, bias, b)
    check_projected_autograd(dy, x, weight, bias, b)


@pytest.mark.parametrize("need_weight", [True, False], ids=["", "frozen weight"])
@pytest.mark.parametrize("bias", [None, (1,), (), (1, 1)], ids=["no bias", "[1]", "[]", "[1, 1]"])
@pytest.mark.parametrize("weight", [(1, 24), (24, 1), (24,)], ids=str)
def test_weights_and_biases(nan_filled, weight, bias, need_weight):
    operands = projected_operands(normal(torch.bfloat16), (5,), 24, 7, bias, weight)
    check_projected(*operands, need_weight)
    wanted = [i for i in range(5) if (i != 1 or need_weight) and (i != 2 or bias is not None)]
    check_projected_autograd(*operands, wanted)


@pytest.mark.parametrize("need_weight", [True, False], ids=["", "frozen weight"])
@pytest.mark.parametrize(("rows", "of_x"), [((2, 3), (6,)), ((6,), (3, 2)), ((1,), ()), ((2, 3), (3, 1, 2))], ids=str)
def test_rows_of_x_are_shaped_otherwise(nan_filled, rows, of_x, need_weight):
    dy, x, weight, bias, b = projected_operands(normal(), rows)
    check_projected(dy, x.reshape(*of_x, 6), weight, bias, b, need_weight)
    wanted = [0, 1, 2, 3, 4] if need_weight else [0, 2, 3, 4]
    check_projected_autograd(dy, x.reshape(*of_x, 6), weight, bias, b, wanted)


@dtypes
def test_sums_of_many_programs(nan_filled, monkeypatch, dtype):
    """More programs than the last kernel sums at a time, and more columns than one of its programs takes."""
    monkeypatch.setattr(projected_kernel, "PROGRAMS_PER_MULTIPROCESSOR", 70)
    recorded = record_launches(monkeypatch, projected_kernel)
    rows, k = projected_kernel.SUM_ROWS + 9, 2 * projected_kernel.SUM_COLUMNS + 6
    check_projected(*projected_operands(normal(dtype), (rows,), k, 3))
    main, summing = recorded
    assert main.blocks > projected_kernel.SUM_ROWS and summing.blocks == 3
    assert summing.arguments["rows"] == main.blocks


def test_rows_are_shared_out(monkeypatch):
    """Every row is some program's, and no more programs run than there are rows."""
    recorded = record_launches(monkeypatch, projected_kernel)
    most = projected_kernel.PROGRAMS_PER_MULTIPROCESSOR * projected_kernel._multiprocessors(torch.device(DEVICE))
    for rows in (1, most, most + 1):
        projected_backward(*backward_operands(*projected_operands(normal(), (rows,)), need_weight=False))
        assert recorded[-2].blocks == min(rows, most)


GATED_REFUSED = {
    "dy transposed": lambda make: (make((8, 5)).t(), make((5, 1)), make((5, 8))),
    "dy expanded, as of a sum": lambda make: (make((1, 1)).expand(5, 8), make((5, 1)), make((5, 8))),
    "dy's rows padded": lambda make: (make((5, 11))[:, :8], make((5, 1)), make((5, 8))),
    "b's rows padded": lambda make: (make((5, 8)), make((5, 1)), make((5, 11))[:, :8]),
    "b transposed": lambda make: (make((5, 8)), make((5, 1)), make((8, 5)).t()),
    "gate is a column": lambda make: (make((5, 8)), make((5, 3))[:, 1:2], make((5, 8))),
    "gate of full size": lambda make: (make((5, 8)), make((5, 8)), make((5, 8))),
    "gate [H]": lambda make: (make((5, 8)), make((8,)), make((5, 8))),
    "gate [1]": lambda make: (make((5, 8)), make((1,)), make((5, 8))),
    "gate of some rows": lambda make: (make((2, 5, 8)), make((2, 1, 1)), make((2, 5, 8))),
    "too wide": lambda make: (make((2, 8193)), make((2, 1)), make((2, 8193))),
    "no rows": lambda make: (make((0, 8)), make((0, 1)), make((0, 8))),
    "no columns": lambda make: (make((5, 0)), make((5, 1)), make((5, 0))),
}


def not_the_kernel(monkeypatch, kernel):
    def refuse(*args):
        raise AssertionError("the kernel ran")

    monkeypatch.setattr(kernel, "gradients", refuse)


@dtypes
@pytest.mark.parametrize("operands", GATED_REFUSED.values(), ids=GATED_REFUSED)
def test_gated_add_backward_of_other_layouts(monkeypatch, dtype, operands):
    dy, gate, b = operands(normal(dtype))
    assert not gated_kernel.fits(dy, gate, b)
    not_the_kernel(monkeypatch, gated_kernel)
    check_gated(dy, gate, b)
    with pytest.raises(AssertionError, match="the kernel ran"):
        gated_backward(*(torch.ones(shape, device=DEVICE) for shape in ((2, 8), (2, 1), (2, 8))))


def changed(i, change, **sizes):
    """The operands with the one at place i laid out otherwise."""

    def operands(make):
        made = list(projected_operands(make, **sizes))
        made[i] = change(make, made[i])
        return made

    return operands


PROJECTED_REFUSED = {
    "dy transposed": changed(0, lambda make, t: make(t.shape[::-1]).t()),
    "dy expanded, as of a sum": changed(0, lambda make, t: make((1, 1)).expand(t.shape)),
    "dy's rows padded": changed(0, lambda make, t: make((t.shape[0], t.shape[1] + 3))[:, : t.shape[1]]),
    "x transposed": changed(1, lambda make, t: make(t.shape[::-1]).t()),
    "x's rows padded": changed(1, lambda make, t: make((t.shape[0], t.shape[1] + 3))[:, : t.shape[1]]),
    "weight of every second": changed(2, lambda make, t: make((1, 2 * t.shape[1]))[:, ::2]),
    "b's rows padded": changed(4, lambda make, t: make((t.shape[0], t.shape[1] + 3))[:, : t.shape[1]]),
    "b expanded": changed(4, lambda make, t: make((1, t.shape[1])).expand(t.shape)),
    "H too wide": changed(0, lambda make, t: t, h=8193, rows=(2,)),
    "K too wide": changed(0, lambda make, t: t, k=8193, rows=(2,)),
    "no rows": changed(0, lambda make, t: t, rows=(0,)),
    "no columns": changed(0, lambda make, t: t, h=0),
}


@dtypes
@biases
@pytest.mark.parametrize("which", PROJECTED_REFUSED)
def test_gate_projected_add_backward_of_other_layouts(monkeypatch, dtype, bias, which):
    dy, x, weight, given, b = PROJECTED_REFUSED[which](normal(dtype))
    given = None if bias is None else given
    assert not projected_kernel.fits(*backward_operands(dy, x, weight, given, b)[:5])
    not_the_kernel(monkeypatch, projected_kernel)
    check_projected(dy, x, weight, given, b)
    if not which.startswith("x"):  # without x its layout is no obstacle
        check_projected(dy, x, weight, given, b, need_weight=False)


@pytest.mark.parametrize("need_weight", [True, False], ids=["", "frozen weight"])
@pytest.mark.parametrize("logit", [lambda make: make((5, 3))[:, 1:2], lambda make: make((1, 1)).expand(5, 1)])
def test_logits_of_other_layouts(monkeypatch, logit, need_weight):
    operands, logit = projected_operands(normal(), (5,)), logit(normal(seed=1))
    assert not projected_kernel.fits(*backward_operands(*operands, need_weight, logit)[:5])
    not_the_kernel(monkeypatch, projected_kernel)
    check_projected(*operands, need_weight, logit)


def test_the_layout_of_an_x_that_is_not_read():
    make = normal()
    dy, x, weight, bias, b = changed(1, lambda make, t: make(t.shape[::-1]).t())(make)
    given = backward_operands(dy, x, weight, bias, b, need_weight=False)
    assert projected_kernel.fits(*given[:5])
    check_projected(dy, x, weight, bias, b, need_weight=False)


def special_values(dtype):
    info = torch.finfo(dtype)
    finite = [0.0, -0.0, -1.5, 1000.0, info.max]
    values = torch.tensor([*finite, float("inf"), float("-inf"), float("nan")], dtype=dtype, device=DEVICE)
    return [t.unsqueeze(-1) for t in torch.cartesian_prod(values, values, values).unbind(1)]


def assert_special(got, expected):
    """nan and inf in the same places, equal within two roundings elsewhere."""
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got, expected, rtol=2 * eps, atol=2 * eps, equal_nan=True)


@dtypes
def test_gated_add_backward_of_special_values(dtype):
    """As the same expression in fp32 and one rounding: what overflows the dtype on the way alone is no inf."""
    dy, gate, b = (t.contiguous() for t in special_values(dtype))
    assert gated_kernel.fits(dy, gate, b)
    got = gated_backward(dy, gate, b)
    a = torch.zeros_like(dy)
    _, *expected = gradients(gated_expression, [t.float() for t in (a, gate, b)], dy.float())
    for mine, theirs in zip(got, expected, strict=True):
        assert_special(mine, theirs.to(dtype))
    zero = expected[1] == 0
    assert zero.any() and torch.equal(got[1][zero].signbit(), expected[1][zero].signbit())


@dtypes
def test_gate_projected_add_backward_of_special_values(dtype):
    """One row each, so that a nan in one does not hide the others in the sum over rows."""
    ordinary = normal(dtype)
    for position in range(6):
        for value in (float("inf"), float("-inf"), float("nan"), -0.0):
            operands = [t.clone() for t in projected_operands(ordinary, (1,), 2, 2)]
            if position < 5:
                operands[position].view(-1)[0] = value
            dy, x, weight, bias, b = operands
            logit = logit_of(dy, x, weight, bias)
            if position == 5:
                logit.fill_(value)
            expected = gradients_from_logit(*(t.float() for t in (dy, x, weight, bias, logit, b)))
            eps = torch.finfo(dtype).eps
            close = dict(rtol=4 * eps, atol=4 * eps, equal_nan=True)  # sums of two terms that may cancel
            for need_weight in (True, False):
                got = projected_backward(*backward_operands(dy, x, weight, bias, b, need_weight, logit))
                for mine, theirs in zip(got, expected, strict=True):
                    if mine.numel():
                        torch.testing.assert_close(mine, theirs.to(dtype).reshape(mine.shape), **close)


def test_calls_are_told_apart(monkeypatch):
    """What is prepared once serves equal layouts only: dtypes, widths, rows, need_bias and x or none differ."""
    forget_calls(monkeypatch, gated_kernel, projected_kernel)
    for _ in range(2):
        for dtype in (torch.float32, torch.bfloat16):
            make = normal(dtype)
            for shape in ((2, 8), (2, 9), (1, 2, 8)):
                check_gated(make(shape), make((*shape[:-1], 1)), make(shape))
                for bias in (None, (1,)):
                    for need_weight in (True, False):
                        operands = projected_operands(make, shape[:-1], 6, shape[-1], bias)
                        check_projected(*operands, need_weight)
    assert len(gated_kernel._calls) == 2 * 3 and len(projected_kernel._calls) == 2 * 3 * 2 * 2
