"""The gate's projection: every spelling that joins a site, and every near miss with its code."""

import pytest
import torch
import torch.nn.functional as F
from programs import ALONE, captured, operands, stops, through_make_fx

import fusionpass

S = torch.sigmoid

PROJECTIONS = {
    "F.linear": (lambda x, w, c, a, b: a + S(F.linear(x, w)) * b, None),
    "F.linear with bias": (lambda x, w, c, a, b: a + S(F.linear(x, w, c)) * b, None),
    "bias by keyword": (lambda x, w, c, a, b: a + S(F.linear(x, w, bias=c)) * b, None),
    "matmul": (lambda x, w, c, a, b: a + S(x @ w.t()) * b, None),
    "mm": (lambda x, w, c, a, b: a + S(torch.mm(x, w.t())) * b, None),
    "addmm": (lambda x, w, c, a, b: a + S(torch.addmm(c, x, w.t())) * b, None),
    "matmul with a vector": (lambda x, w, c, a, b: a + S((x @ w[0]).unsqueeze(-1)) * b, None),
    "an index that adds a dim": (lambda x, w, c, a, b: a + S((x @ w[0])[:, None]) * b, None),
    "an index that takes a part": (
        lambda x, w, c, a, b: a + S((x @ torch.cat((w, w)).t())[:, :1]) * b,
        "not-a-projection",
    ),
    "mv": (lambda x, w, c, a, b: a + S(torch.mv(x, w[0]).unsqueeze(-1)) * b, None),
    "addcmul": (lambda x, w, c, a, b: torch.addcmul(a, S(F.linear(x, w)), b), None),
    "view of the logit": (
        lambda x, w, c, a, b: a.view(2, 2, 8) + S(F.linear(x, w).view(2, 2, 1)) * b.view(2, 2, 8),
        None,
    ),
    "x is 3-d, a is 2-d": (lambda x, w, c, a, b: a + S(F.linear(x.view(2, 2, 6), w).reshape(4, 1)) * b, None),
    "all by keyword": (lambda x, w, c, a, b: a + S(input=F.linear(input=x, weight=w, bias=c)) * b, None),
    # the core is rewritten and the projection stays
    "reshape by keyword": (
        lambda x, w, c, a, b: a + S(torch.reshape(input=F.linear(x, w), shape=(4, 1))) * b,
        "not-a-projection",
    ),
    "many columns": (lambda x, w, c, a, b: a + S(F.linear(x, w.expand(8, 6))) * b, "gate-columns"),
    "not a projection": (lambda x, w, c, a, b: a + S(x[:, :1]) * b, "not-a-projection"),
    "logit read twice": (lambda x, w, c, a, b: ((g := F.linear(x, w)), a + S(g) * b), "gate-used-elsewhere"),
    "sigmoid read twice": (lambda x, w, c, a, b: ((s := S(F.linear(x, w))), a + s * b), "gate-used-elsewhere"),
    "batched matmul": (
        lambda x, w, c, a, b: a[:1].unsqueeze(0) + S(x[:1].unsqueeze(0) @ w.t().unsqueeze(0)) * b[:1].unsqueeze(0),
        "gate-columns",
    ),
    "b is the sigmoid": (lambda x, w, c, a, b: a[:, :1] + (s := S(F.linear(x, w))) * s, "gate-used-elsewhere"),
    "addmm scaled": (lambda x, w, c, a, b: a + S(torch.addmm(c, x, w.t(), alpha=2)) * b, "scaled"),
    "x written": (lambda x, w, c, a, b: _x_written(x, w, a, b), "mutation-between"),
    "no_grad projection": (lambda x, w, c, a, b: _no_grad_projection(x, w, a, b), "state-change-between"),
}


def _x_written(x, w, a, b):
    x = x + 0
    g = F.linear(x, w)
    x.mul_(2)
    return a + S(g) * b, x


def _no_grad_projection(x, w, a, b):
    with torch.no_grad():
        g = F.linear(x, w)
    return a + S(g) * b


# make_fx records no grad mode, no keywords, and a batched matmul as bmm.
UNDER_MAKE_FX = {"no_grad projection": None, "reshape by keyword": None, "batched matmul": "not-a-projection"}


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("tracer", ["dynamo", "make_fx"])
def test_gate_projection(name, tracer):
    function, code = PROJECTIONS[name]
    args = operands((4, 6), (1, 6), (1,), (4, 8), (4, 8))
    expected = function(*args)
    if tracer == "dynamo":
        report = captured(function, *args)
        got = fusionpass.fuse(lambda *x: function(*x))(*args)
    else:
        graph_module, report = through_make_fx(function, *args)
        got = graph_module(*args)
        code = UNDER_MAKE_FX.get(name, code)
    (site,) = report.rewrites
    if code is None:
        assert site.stages == ["gate_projection", "gated_add"]
        assert (site.kernels_before, site.kernels_after) == ((3 if "addcmul" in site.nodes else 4), 1)
    else:
        assert site.stages == ["gated_add"]
    around = dict.fromkeys(ALONE, "gate-columns") if name == "many columns" else ALONE
    assert stops(site) == around | ({} if code is None else {"gate_projection": code})
    torch.testing.assert_close(got, expected)


def test_module_linear_under_symbolic_trace():
    """symbolic_trace leaves nn.Linear a module call: its weight is read through a get_attr of our own."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.shared_expert_gate = torch.nn.Linear(8, 1)

        def forward(self, x, a, b):
            return a + torch.sigmoid(self.shared_expert_gate(x)) * b

    block = Block()
    args = [torch.randn(4, 8) for _ in range(3)]
    graph_module, report = fusionpass.rewrite(torch.fx.symbolic_trace(block), args)
    assert report.rewrites[0].stages == ["gate_projection", "gated_add"]
    torch.testing.assert_close(graph_module(*args), block(*args))
    block.shared_expert_gate.register_forward_hook(lambda *_: None)
    _, report = fusionpass.rewrite(torch.fx.symbolic_trace(block), args)
    assert stops(report.rewrites[0])["gate_projection"] == "module-hook"
