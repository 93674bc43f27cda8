"""What `profitable_only` leaves to Inductor: by what the op keeps apart, by size, and never without saying so."""

import pytest
import torch
import torch.nn.functional as F
from programs import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import fusionpass
from fusionpass.engine import run
from fusionpass.options import Options
from fusionpass.rules.cost import BYTES_PER_US, KERNEL_US, PROJECTION_US, TUNED_PROJECTION_US

S = torch.sigmoid
H = 256


def formula(x, w, a, b):
    return a + S(F.linear(x, w)) * b


def normed(total):
    wide = total.float()
    return total, (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(total.dtype)


# name -> program of (x, w, a, b, r), how many tensors of [T, H] Inductor would have kept in its kernel
PROGRAMS = {
    "nothing around": (lambda x, w, a, b, r: formula(x, w, a, b), 0),
    "operands from matmuls": (lambda x, w, a, b, r: formula(x, w, a @ r.t() @ r, torch.mm(b, r.t()) @ r), 0),
    "a from a pointwise op": (lambda x, w, a, b, r: formula(x, w, F.silu(a), b), 1),
    "a from a reduction": (lambda x, w, a, b, r: formula(x, w, torch.stack([a, r]).amax(0), b), 1),
    "a through a view": (lambda x, w, a, b, r: formula(x, w, (a.view(-1) * 2).view(a.shape), b), 1),
    "a divided": (lambda x, w, a, b, r: formula(x, w, a / r, b), 1),
    "a subtracted from a number": (lambda x, w, a, b, r: formula(x, w, 1 - a, b), 1),
    "a modulo": (lambda x, w, a, b, r: formula(x, w, a % 2, b), 1),
    "a and b from pointwise ops": (lambda x, w, a, b, r: formula(x, w, a * 2, b.exp()), 2),
    # what others read too is written anyway, and may well be needed before the op can run
    "a is read by a matmul as well": (lambda x, w, a, b, r: formula(x, w, (t := a * 2), t @ r.t() @ r), 0),
    "a is returned as well": (lambda x, w, a, b, r: ((t := a * 2), formula(x, w, t, b)), 1),
    "a pointwise reader": (lambda x, w, a, b, r: formula(x, w, a, b).relu(), 1),
    "a reader of what stands before": (lambda x, w, a, b, r: formula(x, w, a, b) * r, 1),
    "a reader that waits for a matmul of it": (lambda x, w, a, b, r: (t := formula(x, w, a, b)) * (t @ r.t() @ r), 0),
    "a matmul reads it": (lambda x, w, a, b, r: formula(x, w, a, b) @ r.t(), 0),
    "residual and norm join": (lambda x, w, a, b, r: normed(r + formula(x, w, a, b)), 0),
    "a reader of the normed sum": (lambda x, w, a, b, r: normed(r + formula(x, w, a, b))[1].relu(), 1),
}


FROM_PRODUCTS = ("operands from matmuls", "a is read by a matmul as well")


def outcome(function, rows, *, tuned=False, device="cuda", dtype=torch.bfloat16, rules=None, **options):
    """The pass over `function` traced on fake tensors of [rows, H]: no GPU is needed to judge."""
    graph_module = torch.fx.symbolic_trace(function)
    with FakeTensorMode() as mode:
        x, a, b, r = (torch.empty(rows, H, dtype=dtype, device=device) for _ in range(4))
        w = torch.empty(1, H, dtype=dtype, device=device)
    FakeTensorProp(graph_module, mode).propagate(x, w, a, b, r)
    given = {"inner": "inductor", **options, **({} if rules is None else {"rules": rules})}
    with torch.no_grad():
        return run(graph_module, Options.from_user({**given, "verify": False}), tuned=tuned)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("tuned", [False, True], ids=["", "tuned"])
@pytest.mark.parametrize("rows", [1, 4096])
def test_left_to_inductor(name, rows, tuned):
    """A site stays when what Inductor would have fused costs more, as kernels and traffic, than the projection saves; tuned,
    one neighbour is enough."""
    function, lost = PROGRAMS[name]
    found = outcome(function, rows, tuned=tuned)
    if tuned and rows == 1 and name in FROM_PRODUCTS:  # see test_one_row_is_folded_into_a_tuned_product
        return
    cost = lost * (KERNEL_US + 2 * rows * H * 2 / BYTES_PER_US)
    if cost > (TUNED_PROJECTION_US if tuned else PROJECTION_US):
        assert [miss.code for miss in found.misses] == ["left-to-inner"]
        assert found.rewrites == []
        assert f"{cost:.1f} us" in found.misses[0].reason
    else:
        assert [miss.code for miss in found.misses] == []
        assert len(found.rewrites) == 1


@pytest.mark.parametrize(
    ("name", "rows", "tuned", "left"),
    [
        ("operands from matmuls", 1, True, True),
        ("operands from matmuls", 1, False, False),
        ("operands from matmuls", 2, True, False),
        ("nothing around", 1, True, False),
    ],
)
def test_one_row_is_folded_into_a_tuned_product(name, rows, tuned, left):
    """A product of one row is a sum to tuned Inductor, which fuses the whole region into it: an op was 1 to 6% slower."""
    found = outcome(PROGRAMS[name][0], rows, tuned=tuned)
    assert [miss.code for miss in found.misses] == ["left-to-inner"] * left
    assert all("one row" in miss.reason for miss in found.misses)


def test_both_answers_occur():
    """The table above has sites on either side, by size alone."""
    function, _ = PROGRAMS["a and b from pointwise ops"]
    assert outcome(function, 32).rewrites
    assert outcome(function, 4096).misses


@pytest.mark.parametrize("name", ["a from a pointwise op", "a pointwise reader"])
def test_a_tuned_inner_compiler_leaves_less_to_save(name):
    assert TUNED_PROJECTION_US < KERNEL_US < PROJECTION_US
    function, _ = PROGRAMS[name]
    assert outcome(function, 1).rewrites
    assert [miss.code for miss in outcome(function, 1, tuned=True).misses] == ["left-to-inner"]


KEPT = {
    "profitable_only is off": {"profitable_only": False},
    "the inner compiler fuses nothing": {"inner": "eager"},
    "aot_eager fuses nothing": {"inner": "aot_eager"},
    "the user wants eager's bits": {"numerics": "eager"},
    "the bare formula, which Inductor is given as it stands": {"rules": ["gated_add"]},
    "on a CPU Inductor is given all as it stands": {"device": "cpu"},
}


@pytest.mark.parametrize("options", KEPT.values(), ids=KEPT)
def test_rewritten_all_the_same(options):
    function, _ = PROGRAMS["a and b from pointwise ops"]
    assert [miss.code for miss in outcome(function, 4096).misses] == ["left-to-inner"]
    found = outcome(function, 4096, **options)
    assert len(found.rewrites) == 1
    assert found.misses == []


def test_unknown_sizes_are_left(monkeypatch):
    """A size nobody can tell, of an operand that Inductor would fuse, decides for Inductor."""
    monkeypatch.setattr("fusionpass.rules.cost.bytes_of", lambda tensor: None)
    function, _ = PROGRAMS["a from a pointwise op"]
    (miss,) = outcome(function, 1).misses
    assert miss.code == "left-to-inner" and "unknown" in miss.reason


def test_a_symbolic_size_counts_as_it_was_traced():
    """Asked under dynamic shapes the size installs no guard: one compile serves every number of rows."""
    compiles, reports = 0, []

    def inner(graph_module, example_inputs):
        nonlocal compiles
        compiles += 1
        reports.append(run(graph_module, Options.from_user({"inner": "inductor"})))
        return graph_module

    function, _ = PROGRAMS["a and b from pointwise ops"]
    compiled = torch.compile(function, backend=inner, dynamic=True)
    with torch.no_grad():
        for rows in (5, 64, 3000):
            given = [torch.randn(rows, H, device=DEVICE) for _ in range(4)]
            x, a, b, r = given
            torch.testing.assert_close(compiled(x, r[:1], a, b, r), function(x, r[:1], a, b, r), rtol=1e-4, atol=1e-4)
    assert compiles == 1
    assert len(reports[0].rewrites) == 1


def test_the_report_says_so():
    """What is left to Inductor is a miss with its reason, in the table as in the JSON; strict calls it nothing rewritten."""
    if DEVICE == "cpu":
        pytest.skip("on a CPU nothing is left to Inductor")
    function, _ = PROGRAMS["a and b from pointwise ops"]
    given = [torch.randn(4096, H, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)]
    x, a, b, r = given
    with torch.no_grad():
        report = fusionpass.explain(function, inner="inductor")(x, r[:1], a, b, r)
    assert [miss.code for miss in report.misses] == ["left-to-inner"]
    assert "left-to-inner" in str(report) and "left-to-inner" in report.to_json()
