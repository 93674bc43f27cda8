"""`_gated_add_backward`, `_gate_projected_add_backward` and `_gate_projected_add_and_logit`: against float64 and eager's
own autograd, and under autograd."""

from math import prod

import pytest
import torch
from ops_helpers import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    ROUNDING,
    assert_no_worse,
    fill_fresh_memory_with_nan,
    forget_calls,
    gated_expression,
    largest,
    projected_expression,
    record_launches,
    significant,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from fusionpass.kernels import gate_projected_add as forward_kernel
from fusionpass.kernels import gate_projected_add_backward as projected_kernel
from fusionpass.kernels import gated_add_backward as gated_kernel
from fusionpass.operators import gate_projected_add, gated_add, implementations

gated_add_op = torch.ops.fusionpass.gated_add.default
projected_op = torch.ops.fusionpass.gate_projected_add.default
gated_backward = torch.ops.fusionpass._gated_add_backward.default
projected_and_logit = torch.ops.fusionpass._gate_projected_add_and_logit.default
projected_backward = torch.ops.fusionpass._gate_projected_add_backward.default
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")  # NumPy, of inf and nan
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
biases = pytest.mark.parametrize("bias", [None, (1,)], ids=["no bias", "bias"])
UTILS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
MANY = 300 if DEVICE == "cuda" else 40  # rows, more than there are programs; the interpreter is slow


def normal(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator).to(DEVICE, dtype)


@pytest.fixture
def nan_filled(monkeypatch):
    fill_fresh_memory_with_nan(monkeypatch)


def test_fresh_memory_is_nan(nan_filled):
    assert all(t.isnan().all() for t in (torch.empty(3), torch.empty_like(torch.zeros(3))))


def gradients(function, inputs, dy, wanted=None, create_graph=False):
    """Of those inputs that are tensors, or of those at the places `wanted`; None where there is no input."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    wanted = [i for i, t in enumerate(leaves) if t is not None] if wanted is None else wanted
    for i, leaf in enumerate(leaves):
        if leaf is not None:
            leaf.requires_grad_(i in wanted)
    found = torch.autograd.grad(function(*leaves), [leaves[i] for i in wanted], dy, create_graph=create_graph)
    result = [None] * len(leaves)
    for i, gradient in zip(wanted, found, strict=True):
        result[i] = gradient
    return result


def double(t):
    return None if t is None else t.detach().double()


# What fp32 may add to an error, in roundings at the scale of the numbers rounded, twice: a result that is off by d before
# it is rounded to the dtype is at most 2 * d further from the truth than the nearest number of the dtype.
# sigmoid: 8 of itself (3 of the approximate exponential, 1 of the sum, 4 of the approximate division), the rounding of
# the exponential's scaled argument, and the logit's error through its slope of at most 1/4. A row's sum: 16 terms in a
# thread, 5 steps in a warp, 4 among warps, the product's own and 6 more between blocks, 32. A sum over rows: as many as
# rows, in sequence, and the 32. A logit that is off by some amount moves the sigmoid by 1/4 of it at most, and the
# sigmoid's slope by 1/10 of it: the second derivative is at most 1 / (6 * sqrt(3)).
SUM = 32


def gated_slacks(dy, gate, b):
    dy, gate, b = map(double, (dy, gate, b))
    sigmoid = (8 + largest(gate)) * ROUNDING
    row = largest((dy * b).abs().sum_to_size(gate.shape))
    return 2 * row * (SUM * ROUNDING / 4 + 2 * sigmoid), 2 * largest(dy) * (sigmoid + ROUNDING)


def projected_slacks(dy, x, weight, logit, b, off=0.0):
    """Of dx, dweight, dbias and db, given the logit, which may be off by `off`."""
    dy, x, weight, logit, b = map(double, (dy, x, weight, logit, b))
    rows, count = x.reshape(prod(x.shape[:-1]), x.shape[-1]), logit.numel()
    sigmoid = (8 + largest(logit)) * ROUNDING
    row = largest((dy * b).abs().sum(-1))
    each = row * (SUM * ROUNDING / 4 + 2 * sigmoid + off / 10)
    most = each + row / 4 * (SUM + count) * ROUNDING
    return (
        2 * each * largest(weight) + 2 * ROUNDING * most * largest(weight),
        2 * most * (largest(rows.abs().sum(0)) if rows.numel() else 0.0),
        2 * most * count,
        2 * largest(dy) * (sigmoid + ROUNDING + off / 4),
    )


def projection(x, weight, bias):
    return torch.nn.functional.linear(x, weight.reshape(1, -1), None if bias is None else bias.reshape(1))


def logit_of(dy, x, weight, bias):
    """As the forward op returns it: in fp32, then rounded to the dtype."""
    given = (None if t is None else t.float() for t in (x, weight, bias))
    return projection(*given).to(dy.dtype).reshape(*dy.shape[:-1], 1)


def logit_error(x, weight, bias):
    """How far a dot product in fp32 may be from the exact one."""
    x, weight, bias = map(double, (x, weight, bias))
    return SUM * ROUNDING * largest(projection(x.abs(), weight.abs(), None if bias is None else bias.abs()))


def off_by_rounding(dy, x, weight, bias):
    """The same, and its rounding to the dtype, which eager's logit has too but maybe to the other side."""
    return logit_error(x, weight, bias) + torch.finfo(dy.dtype).eps / 2 * largest(logit_of(dy, x, weight, bias))


def gradients_from_logit(dy, x, weight, bias, logit, b):
    """(dx, dweight, dbias, db) of eager's own autograd where the projection's result is `logit`."""
    _, dlogit, db = gradients(gated_expression, (torch.zeros_like(dy), logit, b), dy)
    return *gradients(projection, (x, weight, bias), dlogit.reshape(*x.shape[:-1], 1)), db


def backward_operands(dy, x, weight, bias, b, need_weight=True, logit=None):
    """Of the op, from the forward's, as autograd gives them."""
    logit = logit_of(dy, x, weight, bias) if logit is None else logit
    return dy, x if need_weight else None, weight, logit, b, list(x.shape[:-1]), bias is not None


def check_gated(dy, gate, b):
    a = torch.zeros_like(dy)
    got = gated_backward(dy, gate, b)
    _, *eagers = gradients(gated_expression, (a, gate, b), dy)
    _, *truths = gradients(gated_expression, map(double, (a, gate, b)), dy.double())
    slacks = gated_slacks(dy, gate, b)
    for mine, like, eager, truth, slack in zip(got, (gate, b), eagers, truths, slacks, strict=True):
        assert mine.shape == like.shape and mine.dtype == like.dtype
        assert_no_worse(mine, eager, truth, slack)
    return got


def check_projected(dy, x, weight, bias, b, need_weight=True, logit=None):
    given = backward_operands(dy, x, weight, bias, b, need_weight, logit)
    logit = given[3]
    got = projected_backward(*given)
    eagers = gradients_from_logit(dy, x, weight, bias, logit, b)
    truths = gradients_from_logit(*map(double, (dy, x, weight, bias, logit, b)))
    slacks = projected_slacks(dy, x, weight, logit, b)
    needed = True, need_weight, bias is not None, True
    shapes = x.shape, (weight.numel(),), (1,), b.shape
    for mine, need, shape, eager, truth, slack in zip(got, needed, shapes, eagers, truths, slacks, strict=True):
        assert mine.dtype == dy.dtype and mine.shape == (shape if need else (0,))
        if need:
            assert_no_worse(mine, eager.reshape(shape), truth.reshape(shape), slack)
    return got


def check_projected_autograd(dy, x, weight, bias, b, wanted=None):
    """The whole op's, whose logit is rounded to the dtype as eager's is."""
    inputs = x, weight, bias, torch.zeros_like(dy), b
    got = gradients(projected_op, inputs, dy, wanted)
    eagers = gradients(projected_expression, inputs, dy, wanted)
    truths = gradients(projected_expression, [double(t) for t in inputs], dy.double(), wanted)
    off = off_by_rounding(dy, x, weight, bias)
    dx, dweight, dbias, db = projected_slacks(dy, x, weight, logit_of(dy, x, weight, bias), b, off)
    slacks = dx, dweight, dbias, 0.0, db
    for mine, like, eager, truth, slack in zip(got, inputs, eagers, truths, slacks, strict=True):
        assert (mine is None) == (truth is None)
        if truth is not None:
            assert mine.shape == like.shape and mine.dtype == like.dtype
            assert_no_worse(mine, eager, truth, slack)
    return got


# The kernels.

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


def projected_operands(make, rows=(4,), k=6, h=8, bias=(1,), weight=None):
    """dy, x, weight, bias, b; logits of size 1."""
    weight = make(weight or (1, k)) / k**0.5
    return make((*rows, h)), make((*rows, k)), weight, None if bias is None else make(bias), make((*rows, h))


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


# Layouts the kernels do not take.

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


# Numbers that are none.


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


# As ops.


def forward_operands(make, **sizes):
    dy, x, weight, bias, b = projected_operands(make, **sizes)
    return x, weight, bias, dy, b


OPERANDS = {
    "gated_add": (gated_backward, lambda make: (make((5, 8)), make((5, 1)), make((5, 8)))),
    "gate_projected_add": (projected_backward, lambda make: backward_operands(*projected_operands(make))),
    "gate_projected_add, no bias": (
        projected_backward,
        lambda make: backward_operands(*projected_operands(make, bias=None)),
    ),
    "gate_projected_add, frozen": (
        projected_backward,
        lambda make: backward_operands(*projected_operands(make), need_weight=False),
    ),
    "gate_projected_add, no bias, frozen": (
        projected_backward,
        lambda make: backward_operands(*projected_operands(make, bias=None), need_weight=False),
    ),
    "gate_projected_add_and_logit": (projected_and_logit, forward_operands),
    "gate_projected_add_and_logit, no bias": (projected_and_logit, lambda make: forward_operands(make, bias=None)),
}
either = pytest.mark.parametrize(("op", "operands"), OPERANDS.values(), ids=OPERANDS)


@dtypes
@either
def test_opcheck(op, operands, dtype):
    opcheck(op, operands(normal(dtype)), test_utils=UTILS)


@pytest.fixture(params=["kernel", "aten"])
def implementation(request, monkeypatch):
    """On a CPU: the Triton kernels under the interpreter, or ATen. On CUDA a layout decides, and there is one case."""
    if DEVICE == "cuda" and request.param == "aten":
        pytest.skip("the same as kernel on CUDA")
    monkeypatch.setattr(implementations, "interpreted", lambda: request.param == "kernel")


@pytest.mark.parametrize("name", LAYOUTS)
def test_opcheck_layouts(name):
    make, lay = normal(), LAYOUTS[name]
    opcheck(gated_backward, (lay(make, (4, 8)), make((4, 1)), make((4, 8))), test_utils=UTILS)
    opcheck(gated_backward, (make((4, 8)), lay(make, (4, 1)), lay(make, (4, 8))), test_utils=UTILS)
    dy, x, weight, logit, b, rows, _ = backward_operands(*projected_operands(make))
    opcheck(projected_backward, (lay(make, dy.shape), x, weight, logit, b, rows, True), test_utils=UTILS)
    opcheck(projected_backward, (dy, None, weight, lay(make, logit.shape), b, rows, True), test_utils=UTILS)
    laid_out = lay(make, x.shape), lay(make, weight.shape)
    opcheck(projected_backward, (dy, *laid_out, logit, lay(make, b.shape), rows, False), test_utils=UTILS)
    opcheck(projected_and_logit, (*laid_out, None, lay(make, dy.shape), b), test_utils=UTILS)
    opcheck(projected_and_logit, (x, weight, make((1,)), dy, lay(make, b.shape)), test_utils=UTILS)


@pytest.mark.parametrize("rows", [0, 1])
def test_opcheck_few_rows(rows):
    make = normal()
    opcheck(gated_backward, (make((rows, 8)), make((rows, 1)), make((rows, 8))), test_utils=UTILS)
    operands = projected_operands(make, (rows,))
    for need_weight in (True, False):
        opcheck(projected_backward, backward_operands(*operands, need_weight), test_utils=UTILS)
    opcheck(projected_and_logit, forward_operands(make, rows=(rows,)), test_utils=UTILS)


@pytest.mark.parametrize("name", ["contiguous", "transposed", "padded rows", "a half", "one row, expanded"])
def test_strides_are_those_of_the_fake(implementation, name):
    """Of each result, for every operand laid out so in turn and all at once."""
    make, lay = normal(), LAYOUTS[name]
    plain = backward_operands(*projected_operands(make))
    frozen = backward_operands(*projected_operands(make, bias=None), need_weight=False)
    for op, operands in (
        (gated_backward, (make((4, 8)), make((4, 1)), make((4, 8)))),
        (projected_backward, plain),
        (projected_backward, frozen),
        (projected_and_logit, forward_operands(make)),
    ):
        two = {i for i, t in enumerate(operands) if isinstance(t, torch.Tensor) and t.dim() == 2}
        for which in [*({i} for i in two), two]:
            laid = [lay(make, tuple(t.shape)) if i in which else t for i, t in enumerate(operands)]
            real = op(*laid)
            with FakeTensorMode() as mode:
                fake = op(*(mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in laid))
            for mine, theirs in zip(real, fake, strict=True):
                assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
                assert significant(mine) == significant(theirs), which


@either
def test_the_same_bits_on_every_run(op, operands):
    given = operands(normal())
    for _ in range(3):
        for mine, again in zip(op(*given), op(*given), strict=True):
            assert torch.equal(mine, again)


@either
def test_results_are_fresh(op, operands):
    given = operands(normal())
    before = [t.clone() for t in given if isinstance(t, torch.Tensor)]
    tensors = [t for t in given if isinstance(t, torch.Tensor)]
    results = [t for t in op(*given) if t.numel()]
    addresses = [t.untyped_storage().data_ptr() for t in (*tensors, *results)]
    assert len(set(addresses)) == len(addresses)
    assert all(torch.equal(t, was) for t, was in zip(tensors, before, strict=True))
    assert all(was.data_ptr() not in [t.data_ptr() for t in results] for was in op(*given) if was.numel())


# The forward op that keeps the logit.


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


# Through autograd.


def counted(monkeypatch, op):
    """Calls of an op from here on."""
    calls, overload = [], op.overload
    monkeypatch.setattr(op, "overload", lambda *args: calls.append(args) or overload(*args))
    return calls


def subsets(n):
    return [tuple(i for i in range(n) if bits >> i & 1) for bits in range(1, 2**n)]


def named(names):
    return lambda wanted: "+".join(names[i] for i in wanted) if isinstance(wanted, tuple) else None


@pytest.mark.parametrize("wanted", subsets(3), ids=named(["a", "gate", "b"]))
def test_gated_add_gradients_that_are_needed(monkeypatch, wanted):
    make = normal()
    inputs, dy = (make((5, 8)), make((5, 1)), make((5, 8))), make((5, 8))
    calls = counted(monkeypatch, gated_add.BACKWARD)
    got = gradients(gated_add_op, inputs, dy, wanted)
    assert len(calls) == ({1, 2} <= set(wanted))  # one alone is cheaper in ATen
    truths = gradients(gated_expression, [double(t) for t in inputs], dy.double(), wanted)
    eagers = gradients(gated_expression, inputs, dy, wanted)
    slacks = (0.0, *gated_slacks(dy, *inputs[1:]))
    for i in wanted:
        assert_no_worse(got[i], eagers[i], truths[i], slacks[i])


WITHOUT_BIAS = [wanted for wanted in subsets(5) if 2 not in wanted]


@pytest.mark.parametrize(
    ("wanted", "bias"),
    [*((wanted, (1,)) for wanted in subsets(5)), *((wanted, None) for wanted in WITHOUT_BIAS)],
    ids=lambda value: "no bias" if value is None else str(value),
)
def test_gate_projected_add_gradients_that_are_needed(monkeypatch, wanted, bias):
    operands = projected_operands(normal(), bias=bias)
    calls = counted(monkeypatch, gate_projected_add.BACKWARD)
    check_projected_autograd(*operands, wanted)
    found = [(x is not None, list(rows), need_bias) for _, x, _, _, _, rows, need_bias in calls]
    assert found == ([(1 in wanted, [4], 2 in wanted)] if {0, 4} <= set(wanted) else [])


FULL = {
    "gated_add": (gated_add_op, gated_expression, gated_add.BACKWARD, [(5, 8), (5, 1), (5, 8)], 0),
    "gate_projected_add": (
        projected_op,
        projected_expression,
        gate_projected_add.BACKWARD,
        [(5, 6), (1, 6), (1,), (5, 8), (5, 8)],
        3,
    ),
}
full = pytest.mark.parametrize(("op", "expression", "backward", "shapes", "a"), FULL.values(), ids=FULL)


def compare_second(got, eagers, truths):
    """Where the one says zero the other may say that there is none."""
    for mine, eager, truth in zip(got, eagers, truths, strict=True):
        if mine is None or truth is None:
            assert all(t is None or not t.any() for t in (mine, truth))
            continue
        slack = 64 * 2 * ROUNDING * largest(truth)  # sums of up to 5 * 8 terms, three products deep
        assert largest(mine.double() - truth) <= slack
        assert_no_worse(mine, eager, truth, slack)


@full
def test_double_backward(monkeypatch, op, expression, backward, shapes, a):
    """A graph of the gradients is recorded from ATen's ops; second derivatives are the expression's in float64."""
    make = normal()
    inputs, dy = [make(shape) for shape in shapes], make((5, 8))
    calls = counted(monkeypatch, backward)

    def second(function, tensors, dy):
        leaves = [t.detach().requires_grad_() for t in (*tensors, dy)]
        first = torch.autograd.grad(function(*leaves[:-1]), leaves[:-1], leaves[-1], create_graph=True)
        assert any(g.requires_grad for g in first)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves, allow_unused=True)

    got = second(op, inputs, dy)
    assert not calls
    compare_second(got, second(expression, inputs, dy), second(expression, [double(t) for t in inputs], dy.double()))
    gradients(op, inputs, dy)
    assert len(calls) == 1  # and without create_graph the op runs


def second_of(function, inputs, dy, wanted, first):
    """Gradients, of the inputs `wanted` and of dy, of the gradients of the inputs `first`."""
    leaves = [None if t is None else t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    dy = dy.detach().requires_grad_()
    found = torch.autograd.grad(function(*leaves), [leaves[i] for i in first], dy, create_graph=True)
    total = sum(g.pow(2).sum() for g in found)
    return torch.autograd.grad(total, [*(leaves[i] for i in wanted), dy], allow_unused=True)


SECOND = [(wanted, wanted, (1,)) for wanted in subsets(5)] + [(wanted, wanted, None) for wanted in WITHOUT_BIAS]
SECOND += [((0, 1, 2, 3, 4), (i,), (1,)) for i in range(5)]  # one gradient's in all


@pytest.mark.parametrize(("wanted", "first", "bias"), SECOND, ids=str)
def test_double_backward_of_some_inputs(implementation, bias, wanted, first):
    """Through the logit, which is a result: the gradients of the gradients that were asked for, and only those."""
    dy, x, weight, bias, b = projected_operands(normal(), (5,), bias=bias)
    inputs = x, weight, bias, normal(seed=1)(b.shape), b
    truths = second_of(projected_expression, [double(t) for t in inputs], dy.double(), wanted, first)
    eagers = second_of(projected_expression, inputs, dy, wanted, first)
    compare_second(second_of(projected_op, inputs, dy, wanted, first), eagers, truths)


@full
def test_gradient_of_a_is_the_incoming_one(op, expression, backward, shapes, a):
    make = normal()
    inputs, dy = [make(shape) for shape in shapes], make((5, 8))
    got = gradients(op, inputs, dy)
    assert got[a].data_ptr() == dy.data_ptr()
    assert all(g.data_ptr() != dy.data_ptr() for i, g in enumerate(got) if i != a)


@full
def test_gradients_of_a_sum_and_twice(op, expression, backward, shapes, a):
    """The sum's gradient is expanded; .grad accumulates into memory of its own."""
    make = normal()
    inputs = [make(shape).requires_grad_() for shape in shapes]
    for _ in range(2):
        op(*inputs).sum().backward()
    assert torch.equal(inputs[a].grad, torch.full((5, 8), 2.0, device=DEVICE))
    once = gradients(op, inputs, torch.ones(5, 8, device=DEVICE))
    for leaf, gradient in zip(inputs, once, strict=True):
        # The sum's gradient takes ATen, this one the kernel.
        torch.testing.assert_close(leaf.grad, 2 * gradient, rtol=64 * ROUNDING, atol=64 * ROUNDING * largest(gradient))


@dtypes
def test_eager_numerics_keep_eagers_gradients(monkeypatch, dtype):
    make = normal(dtype)
    inputs, dy = (make((5, 8)), make((5, 1)), make((5, 8))), make((5, 8))
    calls = counted(monkeypatch, gated_add.BACKWARD)
    got = gradients(lambda *tensors: gated_add_op(*tensors, numerics="eager"), inputs, dy)
    assert not calls
    assert all(map(torch.equal, got, gradients(gated_expression, inputs, dy)))


def saved_bytes(function, inputs):
    """Of the storages that the backward of `function` keeps alive."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(*inputs)
    assert y.requires_grad
    return sum(kept.values())


SAVING = [("gated_add", wanted, True) for wanted in subsets(3)]
SAVING += [("gate_projected_add", wanted, True) for wanted in subsets(5)]
SAVING += [("gate_projected_add", wanted, False) for wanted in WITHOUT_BIAS]


@dtypes
@pytest.mark.parametrize(("which", "wanted", "bias"), SAVING, ids=str)
def test_no_more_memory_is_saved_than_by_eager(implementation, which, wanted, bias, dtype):
    op, expression, _, shapes, _ = FULL[which]
    make = normal(dtype)
    inputs = [make(shape).requires_grad_(i in wanted) for i, shape in enumerate(shapes)]
    if not bias:
        inputs[2] = None
    assert saved_bytes(op, inputs) <= saved_bytes(expression, inputs)


@pytest.mark.parametrize("wanted", [w for w in subsets(5) if 1 not in w], ids=str)
def test_a_frozen_weight_saves_no_x(wanted):
    inputs = [normal()(shape).requires_grad_(i in wanted) for i, shape in enumerate(FULL["gate_projected_add"][3])]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        projected_op(*inputs)
    assert inputs[0].data_ptr() not in kept


@full
def test_compiled_training_runs_the_op(op, expression, backward, shapes, a):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    targets = []

    def keep(graph_module, example_inputs):
        targets.extend(node.target for node in graph_module.graph.nodes)
        return make_boxed_func(graph_module)

    compiled = torch.compile(
        lambda *t: op(*t), backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True
    )
    make = normal()
    inputs, dy = [make(shape) for shape in shapes], make((5, 8))
    got = gradients(compiled, inputs, dy)
    assert backward.overload in targets
    assert (gate_projected_add.AND_LOGIT.overload in targets) == (op is projected_op)
    assert all(map(torch.equal, got, gradients(op, inputs, dy)))


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
