"""The backward ops as ops: opcheck, their fakes' strides, and results that are fresh and the same on every run."""

import ops_backward_helpers
import pytest
import torch
from ops_backward_helpers import (
    UTILS,
    backward_operands,
    dtypes,
    forward_operands,
    gated_backward,
    normal,
    projected_and_logit,
    projected_backward,
    projected_operands,
)
from ops_helpers import LAYOUTS, significant
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")  # NumPy, of inf and nan
implementation = ops_backward_helpers.implementation

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
