"""The norm: every spelling of norm(o, w) that joins a site's o = r + (a + S(g) * b), and every near miss with its code."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from programs import DEVICE, assert_no_less_exact, doubled, operands, stops, tensors
from stages_helpers import BF16, F32, H, S, T, check, flat, sums

import fusionpass


def normed(norm):
    def function(a, b, g, r, w):
        o = r + (a + S(g) * b)
        return o, norm(o, w)

    return norm if norm.__code__.co_argcount != 2 else function


def norming(dtype=F32, weight_dtype=None):
    *rest, w = operands((T, H), (T, H), (T, 1), (T, H), (H,), dtype=dtype)
    return [*rest, w.to(weight_dtype or dtype)]


def inverse(x, mean):
    return x * torch.rsqrt(mean + 1e-6)


def unit(x):
    return inverse(x, x.pow(2).mean(-1, keepdim=True))


def llama(o, w):
    return w * unit(o.to(torch.float32)).to(o.dtype)


def gemma(o, w):
    return (unit(o.float()) * (1.0 + w.float())).type_as(o)


NORMED = {
    "Llama": llama,
    "Gemma": gemma,
    "x * x, eps first": lambda o, w: (
        ((x := o.float()) * torch.rsqrt(1e-6 + torch.mean(x * x, -1, True))).to(o.dtype) * w
    ),
    "square": lambda o, w: ((x := o.float()).square().mean((-1,), True).add(1e-6).rsqrt() * x * w.float()).to(o.dtype),
    "x ** 2": lambda o, w: w * (((x := o.float()) ** 2).mean(1, keepdim=True).add(1e-6).rsqrt() * x).to(o.dtype),
    "1 + w in the dtype": lambda o, w: unit(o.float()).to(o.dtype) * (1 + w),
    "no weight": lambda o, w: unit(o.float()).to(o.dtype),
    "float32 product": lambda o, w: (w.float() * unit(o.float())).to(o.dtype),
    "read by several": lambda o, w: ((n := llama(o, w)) + 1, n.cos(), n),
    "widened afterwards": lambda o, w: llama(o, w).float(),
    "sum read by several": lambda o, w: (o.cos(), llama(o, w), o.amax(-1)),
    "F.rms_norm": lambda o, w: F.rms_norm(o, (H,), w, 1e-6),
    "F.rms_norm, keywords": lambda o, w: F.rms_norm(o, normalized_shape=[H], weight=w, eps=1e-6),
    "F.rms_norm, no weight": lambda o, w: F.rms_norm(o, (H,), eps=1e-6),
    "torch.rms_norm": lambda o, w: torch.rms_norm(o, (H,), w, 1e-6),
}
# make_fx takes torch's own norm apart.
TRACED = [
    (name, tracer) for name in NORMED for tracer in ("dynamo", "fake") if tracer == "dynamo" or "rms_norm" not in name
]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("name", "tracer"), TRACED)
def test_rms_norm(name, tracer, dtype):
    check(normed(NORMED[name]), norming(dtype), tracer, ["residual", "rms_norm"])


def test_a_norm_without_residual():
    """The sum goes into the norm itself, and elsewhere."""

    def function(a, b, g, r, w):
        return (o := a + S(g) * b), llama(o, w)

    check(function, norming(BF16), "dynamo", ["rms_norm"], "used-elsewhere", "residual")


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("norm", [llama, gemma])
def test_a_float32_weight(norm, cast):
    """Gemma's spelling widens it anyway; Llama's joins without it, or with it where the float32 product is cast down."""
    function = normed((lambda o, w: norm(o, w).to(o.dtype)) if cast else norm)
    site = check(function, norming(BF16, F32), "dynamo", ["residual", "rms_norm"])
    # The weight's product, and the cast after it or Gemma's sum, are among the kernels that go where it joins.
    assert site.kernels_before == (11 if norm is llama and not cast else 13)


def _weight_written(a, b, g, r, w):
    w = w.clone()
    o = r + (a + S(g) * b)
    w.mul_(2)
    return o, llama(o, w)


def _weight_written_after_its_cast(a, b, g, r, w):
    w = w.clone()
    wide = 1 + w.float()
    w.mul_(2)
    o = r + (a + S(g) * b)
    return o, (unit(o.float()) * wide).to(o.dtype)


def _sum_written(a, b, g, r, w):
    o = r + (a + S(g) * b)
    o.mul_(2)
    return o, llama(o, w)


def _no_grad_outside_the_norm(a, b, g, r, w):
    with torch.no_grad():
        o = r + (a + S(g) * b)
    return o, llama(o, w)


def _scale_read_elsewhere(o, w):
    scale = torch.rsqrt((x := o.float()).pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * (x * scale).to(o.dtype), scale


NOT_NORMED = {
    "not-an-rms-norm": {
        "over another dim": lambda o, w: inverse(x := o.float(), x.pow(2).mean(0, keepdim=True)).to(o.dtype),
        "without keepdim": lambda o, w: ((x := o.float()) * torch.rsqrt(x.pow(2).mean(-1) + 1)[:, None]).to(o.dtype),
        "to the fourth": lambda o, w: inverse(x := o.float(), x.pow(4).mean(-1, True)).to(o.dtype),
        "of another tensor": lambda o, w: inverse(o.float(), w.float().pow(2).mean(-1, True)).to(o.dtype),
        "sum instead of mean": lambda o, w: inverse(x := o.float(), x.pow(2).sum(-1, True)).to(o.dtype),
        "eps is a tensor": lambda o, w: (x := o.float()) * torch.rsqrt(x.square().mean(-1, True) + w[0].abs()),
        "in the sum's dtype": lambda o, w: unit(o),
        "layer_norm": lambda o, w: F.layer_norm(o, (H,), w),
        "F.rms_norm over two dims": lambda o, w: F.rms_norm(o, (T, H)),
        "F.rms_norm of a slice": lambda o, w: F.rms_norm(o[1:], (H,), w),
    },
    "used-elsewhere": {
        "its scale is read elsewhere": _scale_read_elsewhere,
        "its float32 sum is read elsewhere": lambda o, w: (w * unit(x := o.float()).to(o.dtype), x),
    },
    "dtype": {
        "weight of two dims": lambda o, w: (unit(o.float()) * w.view(1, H).float()).to(o.dtype),
        "result in float32": lambda o, w: unit(o.float()) * w.float(),
        "result in float16": lambda o, w: (unit(o.float()) * w.float()).half(),
    },
    "late-operand": {
        "weight is computed from the sum": lambda o, w: F.rms_norm(o, (H,), o[0] + w, 1e-6),
        "weight is computed after the sum": lambda o, w: llama(o, w * 2),
    },
    "mutation-between": {
        "weight written": _weight_written,
        "weight written after its cast": _weight_written_after_its_cast,
        "sum written": _sum_written,
    },
    "state-change-between": {"no_grad outside the norm": _no_grad_outside_the_norm},
}


@pytest.mark.parametrize(("name", "code"), flat(NOT_NORMED))
def test_not_rms_norm(name, code):
    check(normed(NOT_NORMED[code][name]), norming(BF16), "dynamo", ["residual"], code, "rms_norm")


def test_the_norm_of_what_is_cast_like_the_sum():
    """`other.type_as(sum)` reads the sum as well, for its dtype; a norm of it is no norm of the sum."""

    def norm(o, w):
        return unit((w.double() * torch.arange(T, device=w.device)[:, None]).type_as(o))

    check(normed(norm), norming(F32), "dynamo", ["residual"], "not-an-rms-norm", "rms_norm")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_default_eps(dtype, weighted):
    """Of small sums most of the norm is eps: float32's, in every dtype."""
    a, b, g, r, w = norming(dtype)
    args = [a * 1e-4, b * 1e-4, g, r * 1e-4, w]

    def function(a, b, g, r, w):
        o = r + (a + S(g) * b)
        return o, F.rms_norm(o, (H,), w if weighted else None)

    with fusionpass.collect() as report:
        got = fusionpass.fuse(lambda *inputs: function(*inputs))(*args)
    assert [site.stages for site in report.rewrites] == [["gated_add", "residual", "rms_norm"]]
    a, b, g, r, w = doubled(args)
    total, scale = r + (a + S(g) * b), w if weighted else 1
    truth, without = (
        total * torch.rsqrt(total.square().mean(-1, True) + eps) * scale for eps in (torch.finfo(F32).eps, 0)
    )
    assert (without - truth).abs().max() > 0.5
    assert_no_less_exact(got, function(*args), [total, truth])


class Block(torch.nn.Module):
    """The formula and a norm whose weight is the module's."""

    def __init__(self, kind="module"):
        super().__init__()
        self.norm = torch.nn.RMSNorm(H, eps=1e-5)
        self.weight = torch.nn.Parameter(torch.rand(H) + 0.5)
        self.norm.weight.data.copy_(self.weight)
        self.kind = kind

    def forward(self, a, b, g, r):
        o = r + (a + S(g) * b)
        written = {"module": lambda: self.norm(o), "function": lambda: F.rms_norm(o, (H,), self.weight, 1e-5)}
        return o, written.get(self.kind, lambda: llama(o, self.weight))()


@pytest.mark.parametrize("tracer", ["symbolic_trace", "dynamo", "export"])
@pytest.mark.parametrize("kind", ["module", "function", "written"])
def test_a_norm_with_a_parameter(kind, tracer):
    """symbolic_trace keeps a module call, and reads a parameter only where it is used, after the sum."""
    block, args = Block(kind).to(DEVICE), sums()
    with torch.no_grad():
        expected = block(*args)
        if tracer == "symbolic_trace":
            after, report = fusionpass.rewrite(torch.fx.symbolic_trace(block), args)
        elif tracer == "export":
            program, report = fusionpass.rewrite(torch.export.export(block, tuple(args)))
            after = program.module()
        else:
            after = fusionpass.fuse(copy.deepcopy(block))
            report = fusionpass.explain(copy.deepcopy(block))(*args)
        assert [site.stages for site in report.rewrites] == [["gated_add", "residual", "rms_norm"]]
        torch.testing.assert_close(tensors(after(*args)), list(expected))


FUSED = torch.ops.aten._fused_rms_norm.default


@pytest.mark.parametrize("eps", [1e-5, None])
@pytest.mark.parametrize(("results", "code"), [((0,), None), ((0, 1), "used-elsewhere"), ((1,), "used-elsewhere")])
def test_the_norm_that_cuda_has_below_autograd(results, code, eps):
    """Two results, the norm and 1 / rms, of which the op computes the first."""

    def function(a, b, g, r, w):
        o = r + (a + S(g) * b)
        norm = FUSED(o, [H], w, eps)
        return o, *[norm[i] for i in results]

    args = norming(BF16)
    with torch.no_grad():
        after, report = fusionpass.rewrite(torch.fx.symbolic_trace(function), args)
        got, want = after(*args), function(*args)
    assert stops(report.rewrites[0]).get("rms_norm") == code
    torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-6)


def test_a_norm_with_hooks():
    block, args = Block().to(DEVICE), sums()
    block.norm.register_forward_hook(lambda module, inputs, output: output * 2)
    with torch.no_grad():
        after, report = fusionpass.rewrite(torch.fx.symbolic_trace(block), args)
        torch.testing.assert_close(after(*args), block(*args))
    assert stops(report.rewrites[0])["rms_norm"] == "module-hook"


def test_a_parameter_that_requires_gradients():
    """symbolic_trace records none of the caller's grad mode: what counts is the mode in which the graph is rewritten."""
    _, report = fusionpass.rewrite(torch.fx.symbolic_trace(Block().to(DEVICE)), sums())
    assert stops(report.rewrites[0])["rms_norm"] == "needs-grad"
