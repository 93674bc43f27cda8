"""Spellings of serving engines and of people: sums in float32, residuals in place, views, statements; near misses."""

import pytest
import torch
import torch.nn.functional as F
from programs import DEVICE, assert_no_less_exact, checked, operands, tensors

import fusionpass

S = torch.sigmoid
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-6


def sums(dtype=BF16):
    """a, b, x, a gate's weight, a residual, a norm's weight."""
    return operands((4, 8), (4, 8), (4, 8), (1, 8), (4, 8), (8,), dtype=dtype)


def combine(a, b, x, w):
    return a + S(F.linear(x, w)) * b


def normed(h, n, dtype=None):
    scaled = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return scaled.to(dtype or h.dtype) * n


def _vllm(a, b, x, w, r, n):
    h = combine(a, b, x, w).to(F32)
    h = h + r.to(F32)
    return normed(h, n, a.dtype), h.to(a.dtype)


def _residual_first(a, b, x, w, r, n):
    h = r.float() + combine(a, b, x, w).float()
    return normed(h, n, a.dtype), h.to(a.dtype)


def _nano_vllm(a, b, x, w, r, n):
    h = combine(a, b, x, w).float().add_(r.float())
    r = h.to(a.dtype)
    h.mul_(torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS))
    return h.to(a.dtype).mul_(n), r


def _wide_sum_read(a, b, x, w, r, n):
    h = combine(a, b, x, w).float() + r.float()
    return normed(h, n, a.dtype), h.to(a.dtype), h * 2


def _residual_in_place(a, b, x, w, r, n):
    r += combine(a, b, x, w)
    return F.rms_norm(r, (8,), n, EPS), r


def _residual_add_(a, b, x, w, r, n):
    r.add_(combine(a, b, x, w))
    return F.rms_norm(r, (8,), n, EPS)


def _sum_add_(a, b, x, w, r, n):
    t = combine(a, b, x, w)
    t.add_(r)
    return F.rms_norm(t, (8,), n, EPS), t


def _pow(a, b, x, w, r, n):
    t = combine(a, b, x, w) + r
    h = t.float()
    return (h * torch.pow(h.pow(2).mean(-1, keepdim=True) + EPS, -0.5) * n.float()).type_as(t), t


def _no_op_cast(a, b, x, w, r, n):
    t = combine(a, b, x, w) + r
    u = t.to(n.dtype)
    h = u.to(F32)
    return (n.to(F32) * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS))).to(u.dtype), t


def _layer_norm(a, b, x, w, r, n):
    t = combine(a, b, x, w) + r
    return F.layer_norm(t, (8,), n, None, EPS), t


ALL = ["gate_projection", "gated_add", "residual", "rms_norm"]
ENGINES = {
    "vLLM, SGLang": (_vllm, ALL),
    "the residual first": (_residual_first, ALL),
    "nano-vllm": (_nano_vllm, ALL),
    "others read the wide sum": (_wide_sum_read, ALL[:3]),
    "r += sum": (_residual_in_place, ALL),
    "r.add_(sum)": (_residual_add_, ALL),
    "sum.add_(r)": (_sum_add_, ALL),
    "v ** -0.5": (_pow, ALL),
    "a cast that does nothing": (_no_op_cast, ALL),
    "LayerNorm": (_layer_norm, ALL[:3]),
}


def check_against_eager(function, args, stages):
    """Values and what is written into the inputs, as near to float64 as eager's own; one site with these stages."""
    fresh = lambda given: [tensor.clone() for tensor in given]  # noqa: E731
    eager_args, fused_args, true_args = fresh(args), fresh(args), [tensor.double() for tensor in args]
    with torch.no_grad():
        eager = [*tensors(function(*eager_args)), *eager_args]
        truth = [*tensors(function(*true_args)), *true_args]
        with fusionpass.collect() as report:
            got = [*tensors(fusionpass.fuse(lambda *given: function(*given))(*fused_args)), *fused_args]
    # Sum and norm are rounded to the dtype; what eager rounds twice on the way to the norm may differ by its own errors.
    assert_no_less_exact(got, eager, truth, args[0].dtype)
    pointers = [[x.data_ptr() == y.data_ptr() for y in values] for values in (got, eager) for x in values]
    assert pointers[: len(got)] == pointers[len(got) :]
    if stages is not None:
        assert [site.stages for site in report.rewrites] == [stages]


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("name", ENGINES)
def test_engines(name, dtype):
    function, stages = ENGINES[name]
    # What is no cast but the tensor itself in float32 leaves other programs: these are compared alone.
    check_against_eager(function, sums(dtype), stages if dtype != F32 else None)


def test_layer_norm_is_named():
    with torch.no_grad():
        (site,) = fusionpass.explain(_layer_norm)(*sums()).rewrites
    assert any("layer_norm" in stop["reason"] for stop in site.stopped if stop["stage"] == "rms_norm")


# Views that keep the rows' order, after the sigmoid, after the product, on a.

VIEWS = {
    "sigmoid(x @ w)[..., None]": lambda a, b, x, w: a + S(x @ w[0])[..., None] * b,
    "sigmoid(x @ w).unsqueeze(-1)": lambda a, b, x, w: a + S(x @ w[0]).unsqueeze(-1) * b,
    "sigmoid(x @ w).view": lambda a, b, x, w: a + S(x @ w[0]).view(4, 1) * b,
    "sigmoid(...).expand_as(b)": lambda a, b, x, w: a + S(F.linear(x, w)).expand_as(b) * b,
    "(sigmoid(...) * b).view": lambda a, b, x, w: a.view(2, 2, 8) + (S(F.linear(x, w)) * b).view(2, 2, 8),
    "a view of three dims on a flat gate": lambda a, b, x, w: (
        a.view(2, 2, 8) + S(x @ w[0]).view(2, 2, 1) * b.view(2, 2, 8)
    ),
}


@pytest.mark.parametrize("tracer", ["dynamo", "fake", "real"])
@pytest.mark.parametrize("name", VIEWS)
def test_views(name, tracer):
    with torch.no_grad():
        (site,) = checked(VIEWS[name], sums(F32)[:4], tracer)
    assert site.stages == ALL[:2]


UNPROJECTED = {
    "a view after the sigmoid": lambda a, b, g: a + S(g.view(4)).view(4, 1) * b,
    "a view after the product": lambda a, b, g: a.view(2, 2, 8) + (S(g) * b).view(2, 2, 8),
    "a full gate, viewed after the product": lambda a, b, g: (
        a.view(2, 2, 8) + (S(g.expand(4, 8) * b) * b).view(2, 2, 8)
    ),
    "p = s * b; p += a": lambda a, b, g: (S(g) * b).add_(a),
    "b.mul_(s) as a statement": lambda a, b, g: (b := b * 1, b.mul_(S(g)), a + b)[2],
    "g.sigmoid_() as a statement": lambda a, b, g: (g := g * 1, g.sigmoid_(), a + g * b)[2],
    "dropout in eval": lambda a, b, g: a + F.dropout(S(g) * b, 0.1, training=False),
    "a float32 a": lambda a, b, g: a.float() + S(g) * b,
    "a float32 a, cast back": lambda a, b, g: (a.float() + S(g) * b).to(b.dtype),
    "a float32 gate": lambda a, b, g: a + S(g.float()) * b,
    "float16 and bfloat16": lambda a, b, g: a.half() + S(g.bfloat16()) * b.bfloat16(),
    "vmap elsewhere": lambda a, b, g: (a + S(g) * b, torch.vmap(lambda row: row * 2)(g))[0],
}


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("name", UNPROJECTED)
def test_rewritten(name, dtype):
    args = operands((4, 8), (4, 8), (4, 1), dtype=dtype)
    if name == "float16 and bfloat16" and dtype == F32:
        pytest.skip("the casts round, and float64 does not know")
    check_against_eager(UNPROJECTED[name], args, ["gated_add"])


@pytest.mark.parametrize("dynamic", [False, True])
def test_views_of_open_sizes(dynamic):
    """The shape in which the formula sees the gate holds sizes that the graph does not fix."""

    def function(a, b, g):
        rows = a.shape[0]
        return a.view(rows, 2, 8) + (S(g) * b).view(rows, 2, 8)

    with torch.no_grad(), fusionpass.collect() as report:
        compiled = torch.compile(function, backend="fusionpass", options={"inner": "eager"}, dynamic=dynamic)
        for rows in (3, 5):
            args = operands((rows, 16), (rows * 2, 8), (rows * 2, 1))
            torch.testing.assert_close(compiled(*args), function(*args))
    assert all(site.stages == ["gated_add"] for site in report.rewrites)
    assert not dynamic or len(report.graphs) == 1


# Near misses, each with its code.

MISSES = {
    "gate * b * 2": (lambda a, b, g: a + S(g) * b * 2.0, "scaled"),
    "2 * gate * b": (lambda a, b, g: a + 2.0 * S(g) * b, "scaled"),
    "mask * (gate * b)": (lambda a, b, g: a + torch.ones_like(g) * (S(g) * b), "scaled"),
    "alpha": (lambda a, b, g: torch.add(a, S(g) * b, alpha=0.5), "scaled"),
    "a.add_(m, alpha=0.5)": (lambda a, b, g: (a * 1).add_(S(g) * b, alpha=0.5), "scaled"),
    "dropout in training": (lambda a, b, g: a + F.dropout(S(g) * b, 0.1, training=True), "dropout-between"),
    "glu": (lambda a, b, g: a + F.glu(torch.cat([b, g.expand_as(b)], -1), dim=-1), "other-form"),
    "lerp": (lambda a, b, g: torch.lerp(a, b, S(g)), "other-form"),
    "einsum": (lambda a, b, g: a + torch.einsum("th,t->th", b, S(g).squeeze(-1)), "other-form"),
    "index_add": (lambda a, b, g: (S(g) * b).index_add(0, torch.arange(4, device=DEVICE), a), "other-form"),
    "a transpose after the sigmoid": (lambda a, b, g: a + S(g.view(2, 2)).t().reshape(4, 1) * b, "view-between"),
    "a transpose after the product": (
        lambda a, b, g: a + (S(g) * b).view(2, 2, 8).transpose(0, 1).reshape(4, 8),
        "view-between",
    ),
    "b.mul_(s) on an input": (lambda a, b, g: (b.mul_(S(g)), a + b)[1], "in-place"),
    "numbers read as others": (lambda a, b, g: a + (S(g) * b).view(torch.int32).view(F32), "view-between"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISSES)
def test_near_misses(name):
    function, code = MISSES[name]
    args = operands((4, 8), (4, 8), (4, 1))
    with torch.no_grad():
        report = fusionpass.explain(function)(*[arg.clone() for arg in args])
        assert not report.rewrites and [miss.code for miss in report.misses] == [code]
        if name != "dropout in training":
            got = fusionpass.fuse(lambda *given: function(*given))(*[arg.clone() for arg in args])
            torch.testing.assert_close(got, function(*[arg.clone() for arg in args]), rtol=0, atol=0)


def test_a_subclass_elsewhere_is_no_reason():
    """Quantised weights are wrapper subclasses, which keep their type in the graph: each site's own operands decide."""
    from torch.testing._internal.two_tensor import TwoTensor

    class Model(torch.nn.Module):
        def __init__(self, gate):
            super().__init__()
            self.gate, self.weight = (
                gate,
                torch.nn.Parameter(TwoTensor(torch.eye(8), torch.eye(8)), requires_grad=False),
            )

        def forward(self, a, b, x):
            other = F.linear(x, self.weight)
            return a + S(F.linear(x, self.gate)) * b, other

    plain, wrapped = torch.zeros(1, 8), TwoTensor(torch.zeros(1, 8), torch.zeros(1, 8))
    for gate, stages in ((plain, [ALL[:2]]), (wrapped, [])):
        torch._dynamo.reset()
        model = Model(torch.nn.Parameter(gate, requires_grad=False)).to(DEVICE)
        with torch.no_grad():
            report = fusionpass.explain(model)(*sums(F32)[:3])
        assert [site.stages for site in report.rewrites] == stages
