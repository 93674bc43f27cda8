"""The combine region as a whole: all stages at once, in every tracer, and what a caller may rely on of the two results."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from programs import (
    ALONE,
    DEVICE,
    WHOLE,
    assert_only_sites_changed,
    checked,
    operands,
    stops,
    tensors,
)
from torch.fx.experimental.proxy_tensor import make_fx

import fusionpass

S = torch.sigmoid
T, K, H = 6, 2, 8
BF16, F32 = torch.bfloat16, torch.float32


def llama(o, w):
    x = o.to(torch.float32)
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(o.dtype)


def layer(y, w, i, x, gate_weight, b, r, norm_weight):
    routed = (y * w.reshape(-1, 1))[i].view(*w.shape, H).sum(1)
    out = r + (routed + S(F.linear(x, gate_weight)) * b).view(r.shape)
    return out, llama(out, norm_weight)


def layer_operands(tokens=T, dtype=F32):
    shapes = (tokens * K, H), (tokens, K), (tokens, H), (1, H), (tokens, H), (1, tokens, H), (H,)
    y, w, x, gate_weight, b, r, norm_weight = operands(*shapes, dtype=dtype)
    return [y, w, torch.randperm(tokens * K).to(DEVICE), x, gate_weight, b, r, norm_weight]


@pytest.mark.parametrize("tracer", ["dynamo", "fake", "real"])
@pytest.mark.parametrize("tokens", [T, 1, 0])
def test_all_stages(tokens, tracer):
    args = layer_operands(tokens)
    expected = layer(*args)
    if tracer == "dynamo":
        with fusionpass.collect() as report:
            got = fusionpass.fuse(lambda *inputs: layer(*inputs))(*args)
    else:
        before = make_fx(layer, tracing_mode=tracer)(*args)
        after, report = fusionpass.rewrite(before)
        assert_only_sites_changed(before, after, report)
        got = after(*args)
    assert [site.stages for site in report.rewrites] == [WHOLE]
    torch.testing.assert_close(tuple(got), expected)


REQUIRING = ["y", "w", "", "x", "gate_weight", "b", "r", "norm_weight"]


@pytest.mark.parametrize("name", [name for name in REQUIRING if name])
def test_gradients_keep_the_stages_out_that_have_none(name):
    """An operand that requires gradients gets eager's: the stages that read it stay outside."""
    index = REQUIRING.index(name)

    def run(function):
        args = layer_operands()
        args[index].requires_grad_()
        with fusionpass.collect() as report:
            out, norm = function(*args)
        (out.square().mean() + norm.cos().mean()).backward()
        return report, args[index].grad

    torch.manual_seed(0)
    _, want = run(layer)
    torch.manual_seed(0)
    report, got = run(fusionpass.fuse(lambda *inputs: layer(*inputs)))
    (site,) = report.rewrites
    kept = {"r": ["finalize"], "norm_weight": ["finalize", "residual"]}.get(name, [])
    assert [stage for stage in site.stages if stage not in ("gate_projection", "gated_add")] == kept
    outside = dict.fromkeys(set(ALONE) - set(kept), "needs-grad")
    assert stops(site) == outside | ({"rms_norm": "not-an-rms-norm"} if name == "r" else {})  # of what is not the sum
    torch.testing.assert_close(got, want)


def test_options():
    (site,) = checked(layer, layer_operands(), numerics="eager")
    assert (site.stages, stops(site)) == (["gated_add"], dict.fromkeys(set(WHOLE) - {"gated_add"}, "numerics-eager"))
    torch._dynamo.reset()
    (site,) = checked(layer, layer_operands(), rules=["gated_add", "residual"])
    left_out = set(WHOLE) - {"gated_add", "residual"}
    assert (site.stages, stops(site)) == (["gated_add", "residual"], dict.fromkeys(left_out, "not-allowed"))


@pytest.mark.parametrize("width", [16384, 16385])
def test_number_of_columns(width):
    def function(a, b, g, r, w):
        o = r + (a + S(g) * b)
        return o, F.rms_norm(o, (width,), w, 1e-6)

    args = operands((1, width), (1, width), (1, 1), (1, width), (width,))
    (site,) = checked(function, args)
    if width == 16384:
        assert site.stages == ["gated_add", "residual", "rms_norm"]
    else:
        assert stops(site) == {"gate_projection": "not-a-projection"} | dict.fromkeys(ALONE, "hidden-size")


def test_symbolic_columns_and_terms():
    """Their number must be known: the kernel is compiled for it."""

    def function(y, w, b, g):
        return (y * w.unsqueeze(-1)).sum(1) + S(g) * b

    y, w, b, g = operands((T, K, H), (T, K), (T, H), (T, 1))
    torch._dynamo.mark_dynamic(y, 1)
    torch._dynamo.mark_dynamic(w, 1)
    with fusionpass.collect() as report:
        got = fusionpass.fuse(function)(y, w, b, g)
    assert stops(report.rewrites[0])["finalize"] == "top-k"
    torch.testing.assert_close(got, function(y, w, b, g))
    torch._dynamo.reset()
    y, w, b, g = operands((T, K, H), (T, K), (T, H), (T, 1))
    torch._dynamo.mark_dynamic(y, 2)
    torch._dynamo.mark_dynamic(b, 1)
    with fusionpass.collect() as report:
        fusionpass.fuse(function)(y, w, b, g)
    assert set(stops(report.rewrites[0])[stage] for stage in ALONE) == {"hidden-size"}


class Layer(torch.nn.Module):
    """As in a model: of the sizes, only the number of tokens comes from an input."""

    def __init__(self):
        super().__init__()
        self.gate, self.norm = torch.nn.Linear(H, 1, bias=False), torch.nn.Parameter(torch.ones(H))

    def forward(self, x, r):
        w, experts = torch.topk(x.softmax(-1), K)
        y = x.repeat_interleave(K, dim=0).cos()
        return layer(y, w, experts.reshape(-1).argsort(), x, self.gate.weight, x.sin(), r, self.norm)


@pytest.mark.parametrize("dynamic", [True, None])
def test_dynamic_tokens_compile_once(dynamic):
    compiled = []

    def backend(graph_module, example_inputs):
        after, report = fusionpass.rewrite(graph_module)
        compiled.append([site.stages for site in report.rewrites])
        return after

    module = Layer().to(DEVICE)
    function = torch.compile(module, backend=backend, dynamic=dynamic)
    with torch.no_grad():
        for tokens in range(2, 10):
            x, r = operands((tokens, H), (1, tokens, H))
            if dynamic is None:
                torch._dynamo.mark_dynamic(x, 0)
                torch._dynamo.mark_dynamic(r, 1)
            torch.testing.assert_close(function(x, r), module(x, r))
    assert compiled == [[WHOLE]]


def test_two_layers():
    """The second layer's residual is the first one's sum, and its experts' input the first one's norm."""

    def function(*args):
        y, w, i, x, gate_weight, b, r, norm_weight = args
        out, norm = layer(*args)
        norm = norm.view(-1, H)
        return layer(torch.cat([norm, norm]), w, i, norm, gate_weight, norm.cos(), out, norm_weight)

    for dtype in (F32, BF16):
        for tracer in ("dynamo", "fake"):
            torch._dynamo.reset()
            first, second = checked(function, layer_operands(dtype=dtype), tracer, sites=2)
            assert (first.stages, second.stages) == (WHOLE, WHOLE)


class Exported(torch.nn.Module):
    def forward(self, *args):
        return layer(*args)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_an_exported_program_that_returns_both_results(dtype):
    """Its signature names the new nodes, and it runs, also after a round trip through a file."""
    args = layer_operands(dtype=dtype)
    program = torch.export.export(Exported(), tuple(args), strict=False)
    after, report = fusionpass.rewrite(program)
    assert [site.stages for site in report.rewrites] == [WHOLE]
    assert_only_sites_changed(program.graph_module, after.graph_module, report)
    op = report.rewrites[0].replacement
    # A cast of float32 to float32 returns the sum itself, which export then knows by the name of the cast.
    assert after.graph_signature.user_outputs == ("to" if dtype is F32 else f"{op}_sum", f"{op}_normed")
    expected = tensors(program.module()(*args))
    file = io.BytesIO()
    torch.export.save(after, file)
    file.seek(0)
    got = tensors(after.module()(*args))
    torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(tensors(torch.export.load(file).module()(*args)), got, rtol=0, atol=0)


def test_the_results_have_memory_of_their_own():
    """They share none with an operand or each other, so what is written to the sum afterwards does not reach the norm."""
    args = layer_operands()
    total, norm = fusionpass.fuse(lambda *inputs: layer(*inputs))(*args)
    memory = [t.untyped_storage().data_ptr() for t in (*args, total, norm)]
    assert len(set(memory)) == len(memory)

    def function(*inputs):
        out, norm = layer(*inputs)
        out.mul_(2)
        return out, norm

    (site,) = checked(function, args)
    assert site.stages == WHOLE
