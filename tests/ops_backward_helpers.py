"""The ops around the backward, their operands, and how they are held to float64 and to eager's own autograd."""

from math import prod

import pytest
import torch
from ops_helpers import (
    DEVICE,
    DTYPES,
    ROUNDING,
    assert_no_worse,
    fill_fresh_memory_with_nan,
    gated_expression,
    largest,
    projected_expression,
)

from fusionpass.operators import implementations

gated_add_op = torch.ops.fusionpass.gated_add.default
projected_op = torch.ops.fusionpass.gate_projected_add.default
gated_backward = torch.ops.fusionpass._gated_add_backward.default
projected_and_logit = torch.ops.fusionpass._gate_projected_add_and_logit.default
projected_backward = torch.ops.fusionpass._gate_projected_add_backward.default
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


def projected_operands(make, rows=(4,), k=6, h=8, bias=(1,), weight=None):
    """dy, x, weight, bias, b; logits of size 1."""
    weight = make(weight or (1, k)) / k**0.5
    return make((*rows, h)), make((*rows, k)), weight, None if bias is None else make(bias), make((*rows, h))


def forward_operands(make, **sizes):
    dy, x, weight, bias, b = projected_operands(make, **sizes)
    return x, weight, bias, dy, b


@pytest.fixture(params=["kernel", "aten"])
def implementation(request, monkeypatch):
    """On a CPU: the Triton kernels under the interpreter, or ATen. On CUDA a layout decides, and there is one case."""
    if DEVICE == "cuda" and request.param == "aten":
        pytest.skip("the same as kernel on CUDA")
    monkeypatch.setattr(implementations, "interpreted", lambda: request.param == "kernel")
