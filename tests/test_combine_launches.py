"""`moe_combine`'s launches, and its calls past the dispatcher."""

import combine_helpers
import pytest
import torch
from combine_helpers import (
    BF16,
    F32,
    ROUTED,
    check,
    dtypes,
    gradients,
    normal,
    norms,
    op,
    operands,
    requiring_grad,
    routed_ways,
)
from ops_helpers import DEVICE, DIRECT

import fusionpass.entry.backend
from fusionpass.kernels import launching, moe_combine
from fusionpass.operators import moe_combine as declared

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")  # NumPy, of inf and nan
forgotten = combine_helpers.forgotten
recorded = combine_helpers.recorded


@pytest.mark.parametrize("norm", ["no norm", "weight"])
@pytest.mark.parametrize("routed", ROUTED)
def test_one_launch_per_call(monkeypatch, recorded, routed, norm):
    launched, launch = [], launching.Launch.__call__
    monkeypatch.setattr(launching.Launch, "__call__", lambda self, *t: launched.append(self) or launch(self, *t))
    for _ in range(3):
        op(**operands(F32, routed, norm=norm))
    (only,) = recorded
    assert launched == [only.launch] * 3
    assert (only.kernel, only.blocks) == ("moe_combine_kernel", 5)
    told = [only.arguments[name] for name in ("TOP_K", "INDEXED", "PERMUTED", "HAS_MASK", "PROJECTED", "HAS_NORM")]
    assert told == [3 * ROUTED[routed][0], *ROUTED[routed][1:], True, norm == "weight"]


def test_variants_are_shared_by_numbers_of_rows(recorded):
    for rows in (1, 3, 4, 1):
        check(operands(BF16, rows=rows))
    op(**operands(BF16, rows=3, norm="no norm"))
    assert [r.blocks for r in recorded] == [1, 3, 4, 3]  # a call with known layouts prepares nothing
    few, *others, without_norm = [r.launch._variants for r in recorded]
    assert all(variants is few for variants in others) and without_norm is not few


@pytest.mark.parametrize("changed", [{"eps": 0.5}, {"offset": 0.0}, {"permuted": False}], ids=str)
def test_equal_layouts_with_other_numbers(changed):
    """A prepared call is not taken for one that differs in nothing else."""
    for arguments in (operands(), operands() | changed, operands()):
        check(arguments)


@pytest.mark.parametrize("registers", [1, 3, 7])
def test_terms_in_groups(monkeypatch, recorded, registers):
    """The loads of a group are on their way together; 10 terms in groups of 1, 3 and 7."""
    monkeypatch.setattr(moe_combine, "REGISTERS", registers)
    check(operands(BF16, columns=64, top_k=10))
    assert [r.arguments["GROUP"] for r in recorded] == [registers]


ALIGNED = {  # dtype, columns, K, elements from row to row of a -> VECTOR
    "bf16": (BF16, 3000, 3000, 3000, 8),
    "fp32": (F32, 3000, 3000, 3000, 4),
    "rows of 8 bytes": (BF16, 3000, 3000, 3004, 4),
    "odd rows": (BF16, 3000, 3000, 3001, 1),
    "K odd": (BF16, 64, 33, 64, 1),
}


@pytest.mark.parametrize(("dtype", "columns", "k", "row", "vector"), ALIGNED.values(), ids=ALIGNED)
def test_vector_is_what_all_rows_are_aligned_to(recorded, dtype, columns, k, row, vector):
    arguments = operands(dtype, rows=1, columns=columns, k=k)
    arguments["a"] = torch.nn.functional.pad(arguments["a"], (0, row - columns))[:, :columns]
    check(arguments)
    (launch,) = recorded
    assert launch.arguments["VECTOR"] == vector and launch.arguments["PRECISE"] == (dtype == F32)


@pytest.fixture
def through_op(monkeypatch):
    """The calls that went through the op's Autograd kernel, told by what it asks first."""
    calls, active = [], declared.transforms_active
    monkeypatch.setattr(declared, "transforms_active", lambda: calls.append("moe_combine") or active())
    return calls


@dtypes
@routed_ways
@norms
def test_direct_calls_compute_the_same_bits(through_op, dtype, routed, norm):
    arguments = operands(dtype, routed, norm=norm)
    got = DIRECT.moe_combine(**arguments)
    assert not through_op
    for mine, theirs in zip(got, op(**arguments), strict=True):
        assert mine.dtype == theirs.dtype and mine.stride() == theirs.stride() and torch.equal(mine, theirs)
    assert through_op


def test_direct_calls_are_the_op_where_something_listens(through_op):
    arguments = operands()
    recording, b = requiring_grad(arguments), arguments["b"]
    with torch.no_grad():
        DIRECT.moe_combine(**recording)
    assert not through_op
    mine = gradients(DIRECT.moe_combine, recording)
    assert through_op
    torch.testing.assert_close(mine, gradients(op, recording), rtol=0, atol=0)
    told = [
        torch.func.jvp(lambda b, f=f: f(**arguments | {"b": b}), (b,), (b.cos(),)) for f in (DIRECT.moe_combine, op)
    ]
    torch.testing.assert_close(*told, rtol=0, atol=0)


class Block(torch.nn.Module):
    """The combine region: a projected gate, the residual, the norm."""

    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(8, 1)
        self.norm = torch.nn.RMSNorm(8, eps=0.125)

    def forward(self, x, a, b, residual):
        total = residual + (a.tanh() + torch.sigmoid(self.gate(x)) * b.cos())
        return total.sin(), self.norm(total)


@pytest.mark.parametrize(("inner", "called"), [("eager", DIRECT.moe_combine), ("aot_eager", op)], ids=["eager", "aot"])
def test_graphs_that_python_runs_call_directly(through_op, inner, called):
    torch.manual_seed(0)
    block, graphs = Block().to(DEVICE).requires_grad_(False), []
    args = [normal(seed=i)((4, 8)) for i in range(4)]

    def backend(graph_module, example_inputs):
        graphs.append(graph_module)
        return fusionpass.entry.backend.fusionpass(graph_module, example_inputs, options={"inner": inner})

    compiled = torch.compile(block, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(*args), block(*args))
    through_op.clear()
    compiled(*args)
    assert not through_op or called is op
    (graph,) = graphs
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert [t for t in targets if t in (op, DIRECT.moe_combine)] == [called]
    assert torch.sigmoid not in targets
