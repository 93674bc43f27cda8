"""The registered ops' gradients, first and second, what is saved for them, and transforms.

An op without a forward-mode rule gives a zero tangent and no error: these must be right or raise.
"""

import ops_operands
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from ops_helpers import DEVICE, gated_expression, projected_expression
from ops_operands import dtypes, gated_add_op, gated_operands, gradients, normal, projected_op, projected_operands

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")  # NumPy, of inf and nan
implementation = ops_operands.implementation

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
