"""`verify`: a site whose op computes anything else than its nodes is named; one that rounds otherwise is not."""

import pytest
import torch
import torch.nn.functional as F
from programs import DEVICE, captured, operands

import fusionpass
from fusionpass.rules import replace

S = torch.sigmoid
pytestmark = pytest.mark.of_verify


def region(y, weights, order, x, gate_weight, b, residual, norm):
    """All five stages."""
    a = (y * weights.reshape(-1, 1))[order].view(4, 2, 8).sum(1)
    total = residual + (a + S(F.linear(x, gate_weight)) * b)
    return total, F.rms_norm(total, (8,), norm, 1e-5)


def arguments(dtype=torch.float32):
    y, weights, x, gate_weight, b, residual, norm = operands(
        (8, 8), (4, 2), (4, 6), (1, 6), (4, 8), (4, 8), (8,), dtype=dtype
    )
    order = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4], device=DEVICE)
    return y, weights, order, x, gate_weight, b, residual, norm


def other(site, *without, numbers=None, **operands):
    """The site, with other operands and numbers than the matcher found."""
    kept = {name: operand for name, operand in site.operands.items() if name not in without}
    return site.changed(operands={**kept, **operands}, numbers={**site.numbers, **(numbers or {})})


def with_numbers(**numbers):
    return lambda site: other(site, numbers=numbers)


# A matcher's mistakes, made on purpose.
MISTAKES = {
    "a and b exchanged": lambda site: other(site, b=site.operands["residual"], residual=site.operands["b"]),
    "another residual": lambda site: other(site, residual=site.operands["b"]),
    "no residual": lambda site: other(site, "residual"),
    "weights in the other order": lambda site: other(site, numbers={"permuted": not site.numbers["permuted"]}),
    "rows not gathered": lambda site: other(site, "inverse", numbers={"permuted": False}),
    "another eps": with_numbers(eps=1e-6),
    "an offset": with_numbers(offset=1.0),
    "no norm weight": lambda site: other(site, "norm_weight"),
}


def make(mistake, monkeypatch):
    """Have the op called for the site as the mistake changes it."""
    build = replace.call_of
    monkeypatch.setattr(replace, "call_of", lambda site, operand: build(mistake(site), operand))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake, dtype, monkeypatch):
    make(MISTAKES[mistake], monkeypatch)
    with (
        torch.no_grad(),
        pytest.raises(fusionpass.VerificationFailed, match=r"verify: site \w+ \(.*finalize.*rms_norm"),
    ):
        captured(region, *arguments(dtype))


def added_to_itself(site):
    """With b in place of a."""
    return other(site, a=site.operands["b"])


def test_a_mistake_in_the_core_is_found(monkeypatch):
    make(added_to_itself, monkeypatch)
    a, b, gate = operands((4, 8), (4, 8), (4, 1))
    with pytest.raises(fusionpass.VerificationFailed, match="the sum is .* the nodes give"):
        fusionpass.fuse(lambda a, b, g: a + S(g) * b)(a, b, gate)
    fused = fusionpass.fuse(lambda a, b, g: a + S(g) * b, verify=False)
    assert not torch.allclose(fused(a, b, gate), a + S(gate) * b)  # what the option is for


def test_a_mistake_in_the_projection_is_found(monkeypatch):
    make(lambda site: other(site, "gate_bias"), monkeypatch)
    x, weight, bias, a, b = operands((4, 6), (1, 6), (1,), (4, 8), (4, 8))
    with pytest.raises(fusionpass.VerificationFailed):
        captured(lambda x, w, c, a, b: a + S(F.linear(x, w, c)) * b, x, weight, bias, a, b)


@pytest.mark.parametrize("numerics", ["fp32", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_no_mistake(dtype, numerics):
    with torch.no_grad():
        report = captured(region, *arguments(dtype), numerics=numerics, strict=True)
    assert report.rewrites


def test_random_numbers_of_the_user_are_left_alone():
    args = arguments()
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    captured(region, *args)
    assert torch.equal(torch.rand(4), want)


def test_symbolic_sizes_are_verified_at_the_traced_ones():
    x, w, a, b = operands((5, 6), (1, 6), (5, 8), (5, 8))
    function = lambda x, w, a, b: a + S(F.linear(x, w)) * b  # noqa: E731
    compiled = torch.compile(function, backend="fusionpass", dynamic=True, options={"inner": "eager", "verify": True})
    torch.testing.assert_close(compiled(x, w, a, b), function(x, w, a, b))


def test_a_rewritten_graph_is_given_up_whole(monkeypatch):
    """`rewrite` leaves the graph it was given as it was, also when verifying fails."""
    make(added_to_itself, monkeypatch)

    def function(a, b, g):
        return a + S(g) * b

    a, b, gate = operands((4, 8), (4, 8), (4, 1))
    graph_module = torch.fx.symbolic_trace(function)
    code = graph_module.code
    with pytest.raises(fusionpass.VerificationFailed):
        fusionpass.rewrite(graph_module, [a, b, gate])
    assert graph_module.code == code
    torch.testing.assert_close(graph_module(a, b, gate), function(a, b, gate), rtol=0, atol=0)


class Counted(torch.nn.Module):
    def forward(self, a, b, g, rows):
        a, b, g = (t[rows.nonzero().view(-1)] for t in (a, b, g))
        return a + S(g) * b


def test_sizes_that_only_a_run_tells_are_said_not_to_be_verified(caplog):
    args = (*operands((4, 8), (4, 8), (4, 1)), torch.tensor([1, 0, 1, 1], device=DEVICE))
    program = torch.export.export(Counted(), args)
    (site,) = fusionpass.rewrite(program, verify=False).report.rewrites
    assert site.verified is None and not caplog.records
    after, report = fusionpass.rewrite(program)
    assert [site.verified for site in report.rewrites] == [False]
    (record,) = caplog.records
    assert "not verified, for its sizes are not known before it runs" in record.message
    torch.testing.assert_close(after.module()(*args), Counted()(*args))


class Mixed(torch.nn.Module):
    def __init__(self, region: bool):
        super().__init__()
        self.gate, self.shared, self.routed = torch.nn.Linear(8, 1), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.region = region

    def forward(self, x):
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.region):
            return self.routed(x) + S(self.gate(x)) * self.shared(x)


@pytest.mark.parametrize(("region", "ambient"), [(False, True), (True, False), (True, True)])
def test_nodes_are_run_under_the_autocast_they_were_traced_under(region, ambient):
    model, (x,) = Mixed(region).to(DEVICE), operands((4, 8))
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=ambient):
        report = captured(model, x)
    assert all(site.verified for site in report.rewrites) and len(report.rewrites) + len(report.misses) == 1


def test_a_graph_whose_casts_are_nodes_is_verified_apart_from_the_callers_autocast():
    model, (x,) = Mixed(False).to(DEVICE), operands((4, 8))
    program = torch.export.export(model, (x,))
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        report = fusionpass.rewrite(program).report
    assert [site.verified for site in report.rewrites] == [True]
