"""The backward ops through autograd: which gradients are needed, second ones, what is saved, compiled training."""

import ops_backward_helpers
import pytest
import torch
from ops_backward_helpers import (
    check_projected_autograd,
    double,
    dtypes,
    gated_add_op,
    gated_slacks,
    gradients,
    normal,
    projected_op,
    projected_operands,
)
from ops_helpers import DEVICE, ROUNDING, assert_no_worse, gated_expression, largest, projected_expression

from fusionpass.operators import gate_projected_add, gated_add

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")  # NumPy, of inf and nan
implementation = ops_backward_helpers.implementation


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
