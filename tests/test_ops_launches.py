"""Which kernel runs, how it is cut up, and how launches are prepared and kept."""

import ops_layouts_helpers
import pytest
import torch
from ops_helpers import DEVICE, record_launches
from ops_layouts_helpers import check_gated, check_projected, kernel_gated_add, normal

from fusionpass.kernels import gate_projected_add as projected_kernel
from fusionpass.kernels import gated_add as gated_kernel
from fusionpass.kernels import launching, programmatic_launch

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")  # NumPy, of inf and nan
nan_filled = ops_layouts_helpers.nan_filled

ROW_LAYOUTS = {  # operands -> kernel, FLAT, elements of a block, programs; blocks of 8 up to 64 elements, 16 beyond
    "blocks divide H": (lambda m: (m((3, 16)), m((3, 1)), m((3, 16))), "rows", False, 8, 6),
    "a block a row": (lambda m: (m((3, 8)), m((3, 1)), m((3, 8))), "rows", False, 8, 3),
    "blocks do not divide H": (lambda m: (m((3, 11)), m((3, 1)), m((3, 11))), "rows", True, 8, 5),
    "H below a block": (lambda m: (m((5, 3)), m((5, 1)), m((5, 3))), "rows", True, 8, 2),
    "the larger block": (lambda m: (m((5, 32)), m((5, 1)), m((5, 32))), "rows", False, 16, 10),
    "the larger, flat": (lambda m: (m((5, 24)), m((5, 1)), m((5, 24))), "rows", True, 16, 8),
    "the last of the smaller": (lambda m: (m((4, 16)), m((4, 1)), m((4, 16))), "rows", False, 8, 8),
    "padded rows": (lambda m: (m((3, 20))[:, :16], m((3, 1)), m((3, 16))), "rows", False, 8, 6),
    "padded, not divided": (lambda m: (m((3, 20))[:, :11], m((3, 1)), m((3, 13))[:, :11]), "rows", False, 8, 6),
    "padded, H below a block": (lambda m: (m((3, 9))[:, :5], m((3, 1)), m((3, 5))), "any", None, None, 1),
    "3-d": (lambda m: (m((2, 3, 16)), m((2, 3, 1)), m((2, 3, 16))), "rows", False, 16, 6),
    "3-d, padded": (lambda m: (m((2, 3, 20))[..., :16], m((2, 3, 1)), m((2, 3, 16))), "rows", False, 16, 6),
    "3-d, leading dims apart": (lambda m: (m((2, 4, 16))[:, :3], m((2, 3, 1)), m((2, 3, 16))), "any", None, None, 1),
    "one row": (lambda m: (m((1, 19)), m((1, 1)), m((1, 19))), "rows", True, 8, 3),
    "one row of blocks": (lambda m: (m((1, 24)), m((1, 1)), m((1, 24))), "rows", False, 8, 3),
    "1-d": (lambda m: (m((19,)), m((1,)), m((19,))), "rows", True, 8, 3),
    "gate expanded over rows": (lambda m: (m((3, 16)), m((1, 1)).expand(3, 1), m((3, 16))), "any", None, None, 1),
    "gate [1]": (lambda m: (m((3, 16)), m((1,)), m((3, 16))), "any", None, None, 1),
    "gate is a column": (lambda m: (m((3, 16)), m((3, 5))[:, 2:3], m((3, 16))), "rows", False, 8, 6),
    "gate expanded, rows padded": (lambda m: (m((3, 20))[:, :16], m((1,)), m((3, 16))), "rows", False, 8, 6),
    "gate [..., H]": (lambda m: (m((3, 16)), m((3, 16)), m((3, 16))), "any", None, None, 1),
    "gate [H]": (lambda m: (m((3, 16)), m((16,)), m((3, 16))), "any", None, None, 1),
    "transposed": (lambda m: (m((16, 3)).t(), m((3, 1)), m((16, 3)).t()), "any", None, None, 1),
    "b transposed": (lambda m: (m((3, 16)), m((3, 1)), m((16, 3)).t()), "any", None, None, 1),
    "every second column": (lambda m: (m((3, 32))[:, ::2], m((3, 1)), m((3, 16))), "any", None, None, 1),
    "a row expanded": (lambda m: (m((1, 16)).expand(3, 16), m((3, 1)), m((3, 16))), "rows", False, 8, 6),
    "H 1": (lambda m: (m((5, 1)), m((5, 1)), m((5, 1))), "any", None, None, 1),
}


@pytest.fixture
def small_row_blocks(monkeypatch):
    monkeypatch.setattr(gated_kernel, "ROW_BLOCKS", ((64, 8, 1), (None, 16, 2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(("operands", "kernel", "flat", "block", "programs"), ROW_LAYOUTS.values(), ids=ROW_LAYOUTS)
def test_which_kernel_adds(monkeypatch, small_row_blocks, dtype, operands, kernel, flat, block, programs):
    recorded = record_launches(monkeypatch, gated_kernel)
    check_gated("kernel", *operands(normal(dtype)))
    (launch,) = recorded
    assert launch.kernel == {"rows": "gated_add_rows_kernel", "any": "gated_add_kernel"}[kernel]
    assert launch.blocks == programs
    if kernel == "rows":
        assert (launch.arguments["FLAT"], launch.arguments["BLOCK"]) == (flat, block)
        assert launch.options["num_warps"] == {8: 1, 16: 2}[block]


def test_numerics_decide_what_is_compiled(monkeypatch, small_row_blocks):
    """Eager's product is rounded, so no multiply-add may be fused; and its sigmoid is exact in 16 bits too."""
    recorded, make = record_launches(monkeypatch, gated_kernel), normal(torch.bfloat16)
    for gate in ((3, 1), (3, 16)):
        for numerics in ("fp32", "eager"):
            kernel_gated_add(make((3, 16)), make(gate), make((3, 16)), numerics)
    told = [(r.options["enable_fp_fusion"], r.arguments["EAGER"], r.arguments["PRECISE"]) for r in recorded]
    assert told == [(True, False, False), (False, True, True)] * 2


def projected_launch(monkeypatch, rows, k, h):
    recorded, make = record_launches(monkeypatch, projected_kernel), normal()
    weight = make((1, k)) / k**0.5
    check_projected("kernel", make((rows, k)), weight, make((1,)), make((rows, h)), make((rows, h)))
    (launch,) = recorded
    return launch.blocks, launch.arguments["BLOCK_K"], launch.arguments["BLOCK_H"]


FEW = projected_kernel.SPLITS[0][0]  # rows


@pytest.mark.parametrize(
    ("rows", "k", "h", "expected"),  # programs, columns of a block of x and of b
    [
        (1, 16, 16, (4, 16, 4)),
        (FEW, 16, 16, (4 * FEW, 16, 4)),
        (FEW + 1, 16, 16, (FEW + 1, 16, 16)),
        (2, 16, 13, (8, 16, 4)),
        (2, 16, 9, (6, 16, 4)),
        (3, 5, 1, (3, 8, 1)),
        (2, 5, 2, (4, 8, 1)),
        (FEW + 1, 40, 50, (4 * (FEW + 1), 16, 16)),
        (2, 40, 50, (2 * 13, 16, 4)),
        (FEW + 1, 16, 17, (2 * (FEW + 1), 16, 16)),
        (FEW + 1, 17, 16, (FEW + 1, 16, 16)),
    ],
    ids=str,
)
def test_how_rows_are_split(monkeypatch, rows, k, h, expected):
    """Few rows take several programs each, H beyond the limit more, K beyond it more rounds; the values are right."""
    monkeypatch.setattr(projected_kernel, "BLOCK_LIMIT", 16)
    assert projected_launch(monkeypatch, rows, k, h) == expected


SPLIT_AND_WARPS = {  # rows, columns: programs, columns of a block of b, warps
    (1, 32): (4, 8, 2),
    (2, 32): (8, 8, 2),
    (3, 32): (6, 16, 2),
    (3, 16): (3, 16, 2),
    (4, 32): (8, 16, 2),
    (5, 32): (5, 32, 2),
    (6, 32): (6, 32, 2),
    (7, 32): (7, 32, 4),
    (4, 64): (8, 32, 8),
}


@pytest.mark.parametrize(("shape", "expected"), SPLIT_AND_WARPS.items(), ids=str)
def test_programs_and_warps_by_rows_and_columns(monkeypatch, shape, expected):
    """The tables, with numbers that the interpreter takes."""
    table = {"SPLITS": ((2, 0, 4), (4, 16, 2)), "COLUMNS_PER_WARP": 8}
    table |= {"FEW_WARPS": 2, "FEW_WARPS_UP_TO": 32, "FEW_WARPS_ROWS": 6}
    for name, value in table.items():
        monkeypatch.setattr(projected_kernel, name, value)
    (rows, h), recorded, make = shape, record_launches(monkeypatch, projected_kernel), normal()
    check_projected("kernel", make((rows, h)), make((1, h)) / h**0.5, None, make((rows, h)), make((rows, h)))
    (launch,) = recorded
    assert (launch.blocks, launch.arguments["BLOCK_H"], launch.options["num_warps"]) == expected


@pytest.mark.parametrize(
    ("k", "h", "expected"),
    [
        (1, 1, (1, 1, 1)),
        (7, 300, (8, 512, 1)),
        (512, 512, (512, 512, 2)),
        (2048, 2048, (2048, 2048, 8)),
        (2048, 5, (2048, 8, 8)),
        (4095, 4096, (4096, 4096, 16)),
        (8192, 8192, (8192, 8192, 16)),
        (8193, 20000, (8192, 8192, 16)),
    ],
    ids=str,
)
def test_blocks_and_warps(k, h, expected):
    assert projected_kernel.blocks_and_warps(k, h) == expected


def test_calls_are_bounded(monkeypatch):
    monkeypatch.setattr(launching.Calls, "LIMIT", 8)
    calls = launching.Calls()
    for i in range(100):
        assert calls.keep(i, -i) == -i
        assert len(calls) <= 8
        assert calls[i] == -i
    assert list(calls) == sorted(calls)  # the newest, in order
    assert set(calls) >= set(range(96, 100))
    full = launching.Calls()
    for i in range(8):
        full.keep(i, i)
    assert list(full) == list(range(8))
    full.keep(8, 8)
    assert list(full) == [4, 5, 6, 7, 8]  # the older half went


def test_a_forgotten_call_is_prepared_again(monkeypatch):
    monkeypatch.setattr(launching.Calls, "LIMIT", 2)
    recorded, make = record_launches(monkeypatch, gated_kernel), normal()
    for rows in (1, 2, 3, 4, 4, 1):
        check_gated("kernel", make((rows, 8)), make((rows, 1)), make((rows, 8)))
    assert len(recorded) == 5


@pytest.mark.parametrize(
    ("a", "strides"),
    [
        (((3, 4), (4, 1)), (4, 1)),
        (((3, 4), (1, 3)), (1, 3)),
        (((3, 4), (1, 3)), (4, 1)),
        (((3, 4), (9, 1)), (4, 1)),
        (((3, 4), (4, 1)), (1, 3)),
        (((1, 4), (9, 1)), (4, 1)),
        (((2, 3, 4), (12, 4, 1)), (4, 8, 1)),
        (((3, 0), (1, 1)), (1, 1)),
    ],
    ids=str,
)
def test_result(a, strides):
    shape, of_a = a
    like = torch.zeros(100, dtype=torch.bfloat16, device=DEVICE).as_strided(shape, of_a)
    y = launching.Result(like, strides).empty(like)
    assert (y.shape, y.stride(), y.dtype, y.device) == (like.shape, strides, like.dtype, like.device)
    assert y.untyped_storage().data_ptr() != like.untyped_storage().data_ptr() or not y.numel()


@pytest.mark.parametrize("chosen", ["2", "", "on"])
def test_a_wrong_choice_of_dependent_launch_names_itself(monkeypatch, chosen):
    monkeypatch.setenv("FUSIONPASS_PDL", chosen)
    with pytest.raises(ValueError, match=f"FUSIONPASS_PDL is '{chosen}', allowed: 0 or 1"):
        programmatic_launch.dependent_launch.__wrapped__(0)


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter is for a CPU")
@pytest.mark.parametrize("chosen", ["0", "1", None])
def test_no_dependent_launch_under_the_interpreter(monkeypatch, chosen):
    if chosen is None:
        monkeypatch.delenv("FUSIONPASS_PDL", raising=False)
    else:
        monkeypatch.setenv("FUSIONPASS_PDL", chosen)
    assert not any(programmatic_launch.dependent_launch.__wrapped__(device) for device in (-1, 0))
