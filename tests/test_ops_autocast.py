"""The ops under autocast do what the nodes they stand for do there, and their own arithmetic is not rounded."""

from __future__ import annotations

import pytest
import torch
from ops_helpers import DEVICE, DIRECT
from torch.fx.experimental.proxy_tensor import make_fx

import fusionpass
from fusionpass.kernels.moe_combine_aten import Arguments, moe_combine_expression
from fusionpass.operators import implementations

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
OPS = torch.ops.fusionpass


@pytest.fixture(params=["kernel", "aten"] if DEVICE == "cpu" else ["kernel"], autouse=True)
def implementation(request, monkeypatch):
    monkeypatch.setattr(implementations, "interpreted", lambda: request.param == "kernel")


def autocast(dtype=BF16):
    return torch.autocast(DEVICE, dtype)


def drawn(*shapes, dtype=F32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def core_nodes(x, weight, bias, a, b):
    return a + torch.sigmoid(torch.nn.functional.linear(x, weight, bias)) * b


@pytest.mark.parametrize("way", [OPS, DIRECT], ids=["op", "direct"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("of_a", [F32, BF16], ids=str)
def test_the_projection_is_cast(way, dtype, of_a):
    """A logit that the nodes compute in autocast's dtype; a and b as they come."""
    x, weight, bias, a, b = drawn((5, 64), (1, 64), (1,), (5, 32), (5, 32))
    a = a.to(of_a)
    with autocast(dtype):
        want = core_nodes(x, weight, bias, a, b)
        got = way.gate_projected_add(x, weight, bias, a, b)
        chosen = way.gate_projected_add(x, weight, bias, a, b, dtype=F16)
    cast = [t.to(dtype) for t in (x, weight, bias)]
    assert got.dtype == want.dtype == F32 and chosen.dtype == F16
    truth = core_nodes(*(t.double() for t in (*cast, a, b)))
    # float32's rounding of 64 products and of the sum: nothing of 16 bits is left in it but the operands.
    assert (got.double() - truth).abs().max() <= 1e-5
    assert torch.equal(got, way.gate_projected_add(*cast, a, b))  # and outside autocast nothing is cast


@pytest.mark.parametrize("way", [OPS, DIRECT], ids=["op", "direct"])
@pytest.mark.parametrize("numerics", ["fp32", "eager"])
def test_the_gated_add_promotes(way, numerics):
    a, gate, b = drawn((5, 32), (5, 1), (5, 32))
    gate = gate.bfloat16()
    with autocast():
        want = a + torch.sigmoid(gate) * b
        got = way.gated_add(a, gate, b, numerics=numerics)
    assert got.dtype == want.dtype == F32
    if numerics == "eager":
        assert torch.equal(got, want)
    truth = a.double() + torch.sigmoid(gate.double()) * b.double()
    assert (got.double() - truth).abs().max() <= (want.double() - truth).abs().max() + 1e-6


@pytest.mark.parametrize("name", ["gated_add", "gate_projected_add"])
def test_gradients_inside_and_outside(name):
    """A backward under autocast computes the same as one outside: neither is rounded on the way."""
    given = drawn((5, 64), (1, 64), (1,), (5, 32), (5, 32)) if "proj" in name else drawn((5, 32), (5, 1), (5, 32))

    def gradients(inside, create_graph=False):
        inputs = [t.clone().requires_grad_() for t in given]
        with autocast():
            y = getattr(OPS, name)(*inputs)
            if inside:
                return torch.autograd.grad(y.square().sum(), inputs, create_graph=create_graph)
        return torch.autograd.grad(y.square().sum(), inputs, create_graph=create_graph)

    for create_graph in (False, True):
        for one, other in zip(gradients(True, create_graph), gradients(False, create_graph), strict=True):
            assert torch.equal(one, other)


COMBINE = {
    "core": {},
    "residual": {"residual": (5, 32)},
    "norm": {"residual": (5, 32), "norm_weight": (32,)},
    "finalize": {"topk_weights": (5, 2), "residual": (5, 32)},
}


def combined(parts):
    shapes = {
        "a": (10 if "topk_weights" in parts else 5, 32),
        "b": (5, 32),
        "x": (5, 64),
        "gate_weight": (1, 64),
        **parts,
    }
    options = dict(zip(shapes, drawn(*shapes.values()), strict=True))
    options |= {"top_k": 2 if "topk_weights" in parts else 0, "eps": 1e-6 if "norm_weight" in parts else None}
    return options


@pytest.mark.parametrize("parts", COMBINE.values(), ids=COMBINE)
def test_moe_combine_with_a_dtype_is_the_op(parts):
    """A graph that was traced under autocast: b in its dtype, and the dtype of the result recorded."""
    options = combined(parts)
    options |= {"b": options["b"].bfloat16()}
    with autocast():
        got = OPS.moe_combine(**options, dtype=BF16)
    cast = options | {name: options[name].bfloat16() for name in ("x", "gate_weight")}
    truth = moe_combine_expression(Arguments(**cast), compute=torch.float64)
    for y, t in zip(got, truth, strict=True):
        assert y.dtype == BF16
        assert ((y.double() - t).abs() <= 2.0**-8 * t.abs() + 1e-5).all()


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("parts", COMBINE.values(), ids=COMBINE)
def test_moe_combine_without_is_its_nodes(parts, records):
    """A graph that was traced without autocast: each node is what autocast makes of it."""
    options = combined(parts)
    given = {n: v.requires_grad_(records) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    with autocast():
        b = torch.nn.functional.linear(given["b"], torch.eye(32, device=DEVICE))
        routed = given["a"]
        if given["top_k"]:
            routed = (routed * given["topk_weights"].reshape(-1, 1)).view(5, 2, 32).sum(1)
        want = core_nodes(given["x"], given["gate_weight"], None, routed, b)
        if "residual" in given:
            want = want + given["residual"]
        total, normed = OPS.moe_combine(**given | {"b": b})
    assert total.dtype == want.dtype
    assert torch.equal(total, want)
    assert normed.dtype == F32 if given["eps"] else True


class Block(torch.nn.Module):
    def __init__(self, residual=False):
        super().__init__()
        self.routed, self.gate, self.shared = torch.nn.Linear(8, 8), torch.nn.Linear(8, 1), torch.nn.Linear(8, 8)
        self.residual = residual

    def forward(self, x):
        y = self.routed(x) + torch.sigmoid(self.gate(x)) * self.shared(x)
        return x + y if self.residual else y


TRACERS = {
    "symbolic_trace": lambda model, x: (torch.fx.symbolic_trace(model), None),
    "export": lambda model, x: (None, torch.export.export(model, (x,))),
    "make_fx": lambda model, x: (make_fx(model)(x), None),
}


@pytest.mark.parametrize("tracer", TRACERS.values(), ids=TRACERS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("records", [False, True])
def test_a_graph_traced_without_runs_under_autocast(tracer, residual, records):
    torch.manual_seed(0)
    model, x = Block(residual).to(DEVICE).requires_grad_(records), torch.randn(4, 8, device=DEVICE)
    graph, program = tracer(model, x)
    if program is None:
        given, (rewritten, report) = graph, fusionpass.rewrite(graph, [x])
    else:
        given, (rewritten, report) = program.module(), fusionpass.rewrite(program)
        rewritten = rewritten.module()
    assert len(report.rewrites) == 1
    with autocast():
        want, got = given(x), rewritten(x)
    assert got.dtype == want.dtype and got.requires_grad == want.requires_grad
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["gate_projected_add", "moe_combine"])
def test_compiled_under_ambient_autocast(name, inner):
    """Forward and backward, of a program that calls the op by hand."""
    given = drawn((5, 64), (1, 64), (1,), (5, 32), (5, 32))

    def run(x, weight, bias, a, b):
        if name == "gate_projected_add":
            return OPS.gate_projected_add(x, weight, bias, a, b, dtype=BF16)
        options = {"x": x, "gate_weight": weight, "gate_bias": bias, "eps": 1e-6}
        return OPS.moe_combine(a, b, **options, dtype=BF16)[1]

    def step(function):
        inputs = [t.clone().requires_grad_() for t in given]
        with autocast():
            y = function(*inputs)
        return y, *torch.autograd.grad(y.float().square().sum(), inputs)

    for got, want in zip(step(torch.compile(run, backend=inner)), step(run), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
