"""`moe_combine` of operands in every layout and shape, of no rows, and past 2**31 elements."""

import random

import combine_helpers
import pytest
import torch
from combine_helpers import BF16, GATES, NORMS, TENSORS, assert_same, check, laid_out, op, operands, shaped_operands
from ops_helpers import DEVICE, DTYPES, LAYOUTS, random_layout

from fusionpass.kernels import launching, moe_combine

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")  # NumPy, of inf and nan
implementation = combine_helpers.implementation
forgotten = combine_helpers.forgotten
nan_filled = combine_helpers.nan_filled
recorded = combine_helpers.recorded


def contiguous(arguments):
    return {name: t.contiguous() if isinstance(t, torch.Tensor) else t for name, t in arguments.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TENSORS)
def test_layouts(nan_filled, name, layout):
    arguments = laid_out(shaped_operands(gate="gate" if name == "gate" else "x, bias"), name, LAYOUTS[layout])
    assert_same(check(arguments), op(**contiguous(arguments)))


@pytest.mark.parametrize("seed", range(20))
def test_random_layouts(nan_filled, seed):
    rng = random.Random(seed)
    arguments = shaped_operands(rng.choice(DTYPES), rng.choice(list(GATES)), seed=seed)
    for name in TENSORS:
        if arguments[name] is not None:
            arguments = laid_out(arguments, name, lambda make, shape: random_layout(rng, make, shape))
    assert_same(check(arguments), op(**contiguous(arguments)))


SHAPES = {  # of 6 rows, 40 columns, K 24 and top_k 3
    "a": [(18, 40), (6, 3, 40), (2, 3, 3, 40)],
    "b": [(6, 40), (2, 3, 40), (6, 1, 40)],
    "gate": [(6,), (6, 1), (1, 6), (2, 3), (2, 3, 1)],
    "x": [(6, 24), (2, 3, 24), (3, 2, 24)],
    "gate_weight": [(1, 24), (24, 1), (24,)],
    "gate_bias": [(), (1,), (1, 1)],
    "topk_weights": [(18,), (6, 3), (2, 3, 3), (18, 1)],
    "inverse": [(18,), (6, 3), (2, 3, 3)],
    "masked": [(18,), (6, 3), (18, 1)],
    "residual": [(6, 40), (2, 3, 40), (1, 6, 40)],
    "norm_weight": [(40,), (1, 40)],
}


@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name in SHAPES for shape in SHAPES[name]], ids=str)
def test_shapes(implementation, nan_filled, name, shape):
    """Operands are told apart by their rows and elements; the results have the shape of the residual, or of b."""
    for residual in (True, False):
        arguments = shaped_operands(gate="gate" if name == "gate" else "x, bias")
        arguments["residual"] = arguments["residual"] if residual else None
        expected = op(**arguments)
        if arguments[name] is not None:
            arguments[name] = arguments[name].reshape(shape)
        got = op(**arguments)
        shaped = arguments["residual"] if residual else arguments["b"]
        assert all(y.shape == shaped.shape for y in got)
        assert_same(got, [y.reshape(shaped.shape) for y in expected])


def test_one_dim(implementation, nan_filled):
    """b of one row without a dim for it."""
    n = operands(rows=1)
    check(n | {"b": n["b"][0], "x": n["x"][0], "residual": None})


@pytest.mark.parametrize("norm", NORMS)
def test_no_rows(monkeypatch, implementation, recorded, norm):
    monkeypatch.setattr(moe_combine, "_launch", None)  # must not be called
    for residual in (None, torch.zeros(0, 3, 48, device=DEVICE), torch.zeros(3, 0, 48, device=DEVICE)):
        arguments = operands(residual=False, norm=norm, rows=0) | {"residual": residual}
        check(arguments)
    assert not recorded


FAR = 2**30 + 8  # the third of these is 2**31 elements away; the storage is reserved, not filled
FAR_STRIDES = {
    "a": [(FAR, 1), (1, FAR)], "b": [(FAR, 1), (1, FAR)], "x": [(FAR, 1), (1, FAR)], "residual": [(FAR, 1), (1, FAR)],
    "topk_weights": [(FAR, 1)], "masked": [(FAR,)], "gate_weight": [(1, FAR)], "norm_weight": [(FAR,)],
}  # fmt: skip


@pytest.mark.parametrize(("name", "strides"), [(name, s) for name in FAR_STRIDES for s in FAR_STRIDES[name]], ids=str)
def test_offsets_past_32_bits(monkeypatch, recorded, name, strides):
    arguments = operands(BF16, rows=3, columns=3, k=3, top_k=1)
    expected, old = op(**arguments), arguments[name]
    try:
        storage = torch.UntypedStorage(2 * (2 * FAR + 16), device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no 4 GiB of address space or memory: {error}")
    arguments[name] = torch.tensor([], dtype=old.dtype, device=DEVICE).set_(storage, 0, old.shape, strides).copy_(old)
    launch = launching.Launch.__call__

    def checked(self, *pointers):  # ahead of the launch, which would end the process
        assert [r.arguments["WIDE"] for r in recorded] == [False, strides[-1] == FAR and name != "masked"]
        launch(self, *pointers)

    monkeypatch.setattr(launching.Launch, "__call__", checked)
    assert_same(op(**arguments), expected)
