"""The rule `finalize`: the weighted top-k sum of a layer without a gate, what it grows over, and its false friends."""

import pytest
import torch
import torch.nn.functional as F
from programs import DEVICE, assert_no_less_exact, captured, operands, stops, through_export, through_make_fx

import fusionpass
from fusionpass.rules import RULES

T, K, H, E = 6, 2, 8, 4
BF16, F32 = torch.bfloat16, torch.float32


def layer(dtype=F32):
    """x [T, H] and the router's w_r [H, E]; the experts' y [T * K, H] and where they lie; shared, residual, norm weight."""
    x, w_r, y, s, r, n, p = operands((T, H), (H, E), (T * K, H), (T, H), (T, H), (H,), (H,), dtype=dtype)
    i = torch.randperm(T * K, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return [x, w_r, y, i, s, r, n, p]


def router(x, w_r):
    weights, _ = (x @ w_r).float().softmax(-1).topk(K, -1)
    return (weights / weights.sum(-1, keepdim=True)).to(x.dtype)


def routed(x, w_r, y, i):
    return (y * router(x, w_r).reshape(-1, 1))[i].view(T, K, H).sum(1)


def norm(h, n, eps=1e-6):
    wide = h.float()
    return n * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(h.dtype)


def norm_by_pow(h, n):
    wide = h.float()
    return (wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + 1e-6, -0.5) * n.float()).type_as(h)


def _in_3d(x, w_r, y, i, s, r, n, p):
    h = r.view(2, 3, H) + (routed(x, w_r, y, i) + s.tanh()).view(2, 3, H)
    return h, norm(h, n)


def _flat_and_back(x, w_r, y, i, s, r, n, p):
    out = routed(x, w_r, y, i).reshape(-1).view(T, H)
    h = r + out
    return h, norm(h, n), norm(r, n)


def _float32_sum(x, w_r, y, i, s, r, n, p):
    w = (x @ w_r).float().softmax(-1).topk(K, -1)[0]
    out = (y.view(T, K, H) * w[..., None]).sum(1).to(y.dtype)
    h = r + out
    return h, norm(h, n), norm(r, n)


def _float32_shared(x, w_r, y, i, s, r, n, p):
    h = r + (routed(x, w_r, y, i).float() + s.tanh().float()).to(x.dtype)
    return h, norm(h, n), norm(r, n)


def _sandwich(x, w_r, y, i, s, r, n, p):
    h = r + norm(routed(x, w_r, y, i) + s.tanh(), p)
    return h, norm(h, n), norm(r, n)


def _sandwich_of_torch(x, w_r, y, i, s, r, n, p):
    h = r + F.rms_norm(routed(x, w_r, y, i), (H,), p, 1e-6)
    return h, F.rms_norm(h, (H,), n, 1e-6), norm(r, n)


def with_residual(out):
    """The program around what comes out of the layer: the residual is read by the norm in front of the layer too."""

    def program(x, w_r, y, i, s, r, n, p):
        h = r + out(x, w_r, y, i, s.tanh())
        return h, norm(h, n), norm(r, n)

    return program


CORE, SHARED, ADDED, NORMED, POST = "finalize", "shared_add", "residual", "rms_norm", "post_norm"
REWRITTEN = {  # program -> stages
    "the sum alone": (lambda x, w_r, y, i, s, r, n, p: routed(x, w_r, y, i), [CORE]),
    "with a norm": (lambda x, w_r, y, i, s, r, n, p: norm(routed(x, w_r, y, i), n), [CORE, NORMED]),
    "a shared expert": (lambda x, w_r, y, i, s, r, n, p: routed(x, w_r, y, i) + s.tanh(), [CORE, SHARED]),
    "shared first": (lambda x, w_r, y, i, s, r, n, p: s.tanh() + routed(x, w_r, y, i), [CORE, SHARED]),
    "none shared": (with_residual(lambda x, w_r, y, i, s: routed(x, w_r, y, i)), [CORE, ADDED, NORMED]),
    "all": (with_residual(lambda x, w_r, y, i, s: routed(x, w_r, y, i) + s), [CORE, SHARED, ADDED, NORMED]),
    "in 3-d": (_in_3d, [CORE, SHARED, ADDED, NORMED]),
    "flat and back": (_flat_and_back, [CORE, ADDED, NORMED]),
    "a factor of the routed sum": (
        with_residual(lambda x, w_r, y, i, s: routed(x, w_r, y, i) * 2.5 + s),
        [CORE, SHARED, ADDED, NORMED],
    ),
    "a factor of both": (
        with_residual(lambda x, w_r, y, i, s: 0.22 * (routed(x, w_r, y, i) + s)),
        [CORE, SHARED, ADDED, NORMED],
    ),
    "halved": (with_residual(lambda x, w_r, y, i, s: (routed(x, w_r, y, i) + s) / 2), [CORE, SHARED, ADDED, NORMED]),
    "a factor and none shared": (
        with_residual(lambda x, w_r, y, i, s: routed(x, w_r, y, i) * 2),
        [CORE, ADDED, NORMED],
    ),
    "float32 weights": (_float32_sum, [CORE, ADDED, NORMED]),
    "a sum of 4-d terms": (
        lambda x, w_r, y, i, s, r, n, p: (y.view(2, 3, K, H) * router(x, w_r).view(2, 3, K, 1)).sum(-2),
        [CORE],
    ),
    "4-d terms and a shared expert": (
        lambda x, w_r, y, i, s, r, n, p: (
            (y.view(2, 3, K, H) * router(x, w_r).view(2, 3, K, 1)).sum(-2) + s.tanh().view(2, 3, H)
        ),
        [CORE, SHARED],
    ),
    "a float32 shared add": (_float32_shared, [CORE, SHARED, ADDED, NORMED]),
    "norms on either side": (_sandwich, [CORE, SHARED, POST, ADDED, NORMED]),
    "torch's norms on either side": (_sandwich_of_torch, [CORE, POST, ADDED, NORMED]),
    "a norm by pow": (
        lambda x, w_r, y, i, s, r, n, p: norm_by_pow(r + routed(x, w_r, y, i), n) + norm(r, n),
        [CORE, ADDED, NORMED],
    ),
    "einsum": (
        lambda x, w_r, y, i, s, r, n, p: torch.einsum("tk,tkh->th", router(x, w_r), y.view(T, K, H)) + s.tanh(),
        [CORE, SHARED],
    ),
    "an inverse, weights from elsewhere": (
        lambda x, w_r, y, i, s, r, n, p: (y[i].view(T, K, H) * w_r.view(-1)[: T * K].view(T, K, 1)).sum(1),
        [CORE],
    ),
    "gathered scores": (
        lambda x, w_r, y, i, s, r, n, p: (
            y.view(T, K, H) * (q := (x @ w_r).sigmoid()).gather(1, (q + 1).topk(K, -1)[1])[..., None]
        ).sum(1),
        [CORE],
    ),
}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("program", "stages"), REWRITTEN.values(), ids=REWRITTEN)
def test_rewritten(program, stages, dtype):
    args = layer(dtype)
    with torch.no_grad():
        report = captured(program, *args, verify=True)
        (site,) = report.rewrites
        assert (site.rule, site.stages) == (CORE, stages) and site.verified and not report.misses
        assert set(stops(site)) == {stage.name for stage in RULES[1].stages} - set(stages)
        got, eager = (_tuple(f(*args)) for f in (fusionpass.fuse(program), program))
        truth = _tuple(program(*(t.double() if t.is_floating_point() else t for t in args)))
    if dtype is F32:  # the norm's casts to float32 round the truth
        torch.testing.assert_close(got, eager)
    else:
        assert_no_less_exact(got, eager, truth)


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("through", [through_make_fx, through_export], ids=["make_fx", "export"])
@pytest.mark.parametrize("name", ["all", "norms on either side", "a factor of the routed sum", "none shared"])
def test_other_tracers(name, through):
    program, stages = REWRITTEN[name]
    with torch.no_grad():
        rewritten, report = through(program, *layer())
        assert [site.stages for site in report.rewrites] == [stages]


def _recurrence(x, w_r, y, i, s, r, n, p):
    """The delta rule's step, as linear attention has it: the keys come from a projection of the state."""
    state, k = y.view(T, K, H), (x @ w_r)[:, :K]
    return (state * k.unsqueeze(-1)).sum(-2) + s


def _after_a_layer(x, w_r, y, i, s, r, n, p):
    """Keys that a projection makes of what a routed layer gave: its top-k is not theirs."""
    h = routed(x, w_r, y, i).tanh()
    k = (h @ w_r)[:, :K]
    return (y.view(T, K, H) * k.unsqueeze(-1)).sum(-2)


def _matrices(y, ids):
    """One product per row, with the matrix that `ids` names for it, as experts of batched_mm have them."""
    return torch.bmm((y.T @ y).expand(4, H, H)[ids], y.unsqueeze(-1)).squeeze(-1)


def _of_all(y, ids):
    return torch.bmm((y.T @ y).expand(T * K, H, H), y.unsqueeze(-1)).squeeze(-1)


def _by_maxima(rows):
    """Weights that two maxima choose, as phimoe's router does: there is no top-k."""

    def program(x, w_r, y, i, s, r, n, p):
        scores = (x @ w_r).softmax(-1)
        first = scores.amax(-1, keepdim=True)
        w = torch.cat([first, (scores * (scores < first)).amax(-1, keepdim=True)], -1)
        return (rows(y, i % 4).view(T, K, H) * w[:, :, None]).sum(1)

    return program


FRIENDS = {  # program -> sites
    "rows of an embedding": (
        lambda x, w_r, y, i, s, r, n, p: (torch.cat([y, y])[i].view(T, K, H) * x[:, :K, None]).sum(1),
        0,
    ),
    "a recurrence": (_recurrence, 0),
    "a recurrence behind a layer": (_after_a_layer, 1),
    "rows of chosen experts": (_by_maxima(_matrices), 1),
    "rows of a product with matrices that nobody chose": (_by_maxima(_of_all), 0),
    "a plain sum": (lambda x, w_r, y, i, s, r, n, p: y.view(T, K, H).sum(1), 0),
    "a mean": (lambda x, w_r, y, i, s, r, n, p: y.view(T, K, H).mean(1), 0),
    "attention": (
        lambda x, w_r, y, i, s, r, n, p: ((x @ x.T).softmax(-1).unsqueeze(-1) * s.expand(T, T, H)).sum(-2),
        0,
    ),
}


@pytest.mark.parametrize(("program", "sites"), FRIENDS.values(), ids=FRIENDS)
def test_false_friends(program, sites):
    """They stay, and are not worth a word either."""
    with torch.no_grad():
        report = captured(program, *layer())
    assert len(report.rewrites) == sites and not report.misses


def _weights_read_twice(x, w_r, y, i, s, r, n, p):
    product = y.view(T, K, H) * router(x, w_r)[..., None]
    return product.sum(1), product


def _y_written(x, w_r, y, i, s, r, n, p):
    y = y + 0
    rows = y[i]
    out = (rows.view(T, K, H) * router(x, w_r)[..., None]).sum(1)
    return out + y.zero_()[:T]


def _written_before_the_add(x, w_r, y, i, s, r, n, p):
    y = y + 0
    out = (y[i].view(T, K, H) * router(x, w_r)[..., None]).sum(1)
    y.zero_()
    return out + s.tanh()


REFUSED = {  # program -> code of the miss
    "a float64 sum": (
        lambda x, w_r, y, i, s, r, n, p: (y[i].view(T, K, H) * router(x, w_r)[..., None]).sum(1, dtype=torch.float64),
        "dtype",
    ),
    "the product is read by others": (_weights_read_twice, "multi-use"),
    "too many terms": (
        lambda x, w_r, y, i, s, r, n, p: (
            torch.cat([y] * 17).view(T, 34, H) * torch.cat([x @ w_r] * 9, -1).topk(34, -1)[0][..., None]
        ).sum(1),
        "top-k",
    ),
    "float64": (
        lambda x, w_r, y, i, s, r, n, p: (y.double()[i].view(T, K, H) * router(x, w_r).double()[..., None]).sum(1),
        "dtype",
    ),
}


@pytest.mark.parametrize(("program", "code"), REFUSED.values(), ids=REFUSED)
def test_refused(program, code):
    with torch.no_grad():
        report = captured(program, *layer())
    assert [(miss.rule, miss.code) for miss in report.misses] == [(CORE, code)] and not report.rewrites


def _into_the_shared_expert(x, w_r, y, i, s, r, n, p):
    shared = s.tanh()
    shared += routed(x, w_r, y, i)
    return shared


def _norm_of_other_rows(x, w_r, y, i, s, r, n, p):
    return r.view(2 * T, H // 2) + norm(routed(x, w_r, y, i).view(2 * T, H // 2), p[: H // 2])


def _norm_laid_out_otherwise(x, w_r, y, i, s, r, n, p):
    out = routed(x, w_r, y, i).view(1, 2, 3, H)
    normed = out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + 1e-6)
    return r.view(1, 2, 3, H) + normed.to(torch.float32, memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("program", "stage", "code"),
    [
        (_written_before_the_add, SHARED, "mutation-between"),
        (lambda x, w_r, y, i, s, r, n, p: (o := routed(x, w_r, y, i), o + s.tanh()), SHARED, "used-elsewhere"),
        (lambda x, w_r, y, i, s, r, n, p: routed(x, w_r, y, i) + s, SHARED, None),
        (lambda x, w_r, y, i, s, r, n, p: routed(x, w_r, y, i) * s, SHARED, "not-a-shared-add"),
        (lambda x, w_r, y, i, s, r, n, p: routed(x, w_r, y, i) + r + norm(r, n), SHARED, "not-there"),
        (lambda x, w_r, y, i, s, r, n, p: torch.add(routed(x, w_r, y, i), s, alpha=2), SHARED, "scaled"),
        (lambda x, w_r, y, i, s, r, n, p: routed(x, w_r, y, i) / 3 + s, SHARED, "not-a-shared-add"),
        (lambda x, w_r, y, i, s, r, n, p: routed(x, w_r, y, i) * float("inf") + s, SHARED, "not-a-shared-add"),
        (lambda x, w_r, y, i, s, r, n, p: norm(routed(x, w_r, y, i), n), POST, "not-there"),
        (lambda x, w_r, y, i, s, r, n, p: norm(routed(x, w_r, y, i), n) * 2, POST, "not-there"),
        (_into_the_shared_expert, SHARED, "in-place"),
        (_norm_of_other_rows, POST, "shape"),
        (lambda x, w_r, y, i, s, r, n, p: r + norm(routed(x, w_r, y, i), p[:1]), POST, "shape"),
        (_norm_laid_out_otherwise, POST, "stride"),
        (lambda x, w_r, y, i, s, r, n, p: (o := routed(x, w_r, y, i), r + norm(o, p)), POST, "used-elsewhere"),
    ],
)
def test_stages_that_stop(program, stage, code):
    with torch.no_grad():
        (site,) = captured(program, *layer()).rewrites
        assert stops(site).get(stage) == code
        torch.testing.assert_close(fusionpass.fuse(program)(*layer()), program(*layer()))


def test_a_stage_left_out_says_so():
    """Not that a later stage took what follows, though one did. And without that stage the first one says what it found."""
    program = REWRITTEN["none shared"][0]
    with torch.no_grad():
        (site,) = captured(program, *layer(), rules=["finalize", "residual", "rms_norm"]).rewrites
        assert {stops(site)[stage] for stage in (SHARED, POST)} == {"not-allowed"}
        (site,) = captured(program, *layer(), rules=["finalize", SHARED, POST]).rewrites
        assert (stops(site)[SHARED], stops(site)[POST]) == ("not-a-shared-add", "not-an-rms-norm")
        alone = captured(lambda *given: norm(routed(*given[:4]), given[6]), *layer(), rules=["finalize", POST])
        assert stops(alone.rewrites[0])[POST] == "not-a-post-norm"


def test_a_post_norm_of_another_dtype():
    def program(x, w_r, y, i, s, r, n, p):
        wide = (routed(x, w_r, y, i) + s.tanh()).float()
        return r.float() + wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)

    with torch.no_grad():
        (site,) = captured(program, *layer(BF16)).rewrites
        assert stops(site)["post_norm"] == "dtype"


def test_a_gated_add_takes_it_first():
    def program(x, w_r, y, i, s, r, n, p):
        h = r + (routed(x, w_r, y, i) + torch.sigmoid(x[:, :1]) * s)
        return h, norm(h, n), norm(r, n)

    with torch.no_grad():
        (site,) = captured(program, *layer()).rewrites
        assert site.rule == "gated_add" and "finalize" in site.stages
        report = captured(program, *layer(), rules=["finalize", "shared_add", "residual", "rms_norm"])
        assert [site.rule for site in report.rewrites] == ["finalize"]


def test_with_gradients():
    """There is no backward yet: it is told, with what to do."""
    args = layer()
    args[2].requires_grad_()
    report = captured(REWRITTEN["all"][0], *args)
    ((miss,), found) = report.misses, report.rewrites
    assert (miss.rule, miss.code, found) == (CORE, "needs-grad", []) and "torch.no_grad()" in miss.reason


def test_a_gated_site_in_training_says_it_once():
    def program(x, w_r, y, i, s, r, n, p):
        return routed(x, w_r, y, i) + torch.sigmoid(x[:, :1]) * s

    args = layer()
    args[2].requires_grad_()
    report = captured(program, *args)
    assert [site.rule for site in report.rewrites] == ["gated_add"] and not report.misses


def test_numerics_eager_keeps_it():
    with torch.no_grad():
        report = captured(REWRITTEN["all"][0], *layer(), numerics="eager")
    assert [(miss.rule, miss.code) for miss in report.misses] == [(CORE, "numerics-eager")]


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["all", "norms on either side", "a factor of both"])
def test_inner_compilers(name, inner):
    program, stages = REWRITTEN[name]
    with torch.no_grad(), fusionpass.collect() as report:
        got = fusionpass.fuse(program, inner=inner)(*layer())
        assert [site.stages for site in report.rewrites] == [stages]
        torch.testing.assert_close(got, program(*layer()))


def _cast_written(x, w_r, y, i, s, r, n, p):
    h = r.float()
    h += routed(x, w_r, y, i).float()
    return h


def _shared_cast_written(x, w_r, y, i, s, r, n, p):
    h = s.float()
    h += routed(x, w_r, y, i)
    return h + r


def _gated_cast_written(x, w_r, y, i, s, r, n, p):
    h = r.float()
    h += s + torch.sigmoid(x[:, :1]) * x
    return h


EXACT = {  # programs that were once rewritten wrongly, or not at all
    "a post-norm behind a view, a broadcast residual": lambda x, w_r, y, i, s, r, n, p: (
        r + norm((routed(x, w_r, y, i) + s.tanh()).view(T, 1, H), p)
    ),
    "a post-norm behind a view, an alpha": lambda x, w_r, y, i, s, r, n, p: torch.add(
        r.view(2, 3, H), norm((routed(x, w_r, y, i) + s.tanh()).view(2, 3, H), p), alpha=2
    ),
    "a post-norm behind a view, a number": lambda x, w_r, y, i, s, r, n, p: (
        norm((routed(x, w_r, y, i) + s.tanh()).view(2, 3, H), p) + 1.0
    ),
    "a residual's cast is written": _cast_written,
    "a shared expert's cast is written": _shared_cast_written,
    "a gated sum's residual, its cast written": _gated_cast_written,
    "a norm's weight of integers, gated": lambda x, w_r, y, i, s, r, n, p: norm(
        s + torch.sigmoid(x[:, :1]) * r, (n * 4).to(torch.int64).to(n.dtype)
    ),
    "a norm's weight of integers": lambda x, w_r, y, i, s, r, n, p: norm(
        r + routed(x, w_r, y, i), (n * 4).to(torch.int64).to(n.dtype)
    ),
    "factors past float32": lambda x, w_r, y, i, s, r, n, p: routed(x, w_r, y * 1e-20, i) * 1e25 * 1e25 + s,
    "an inverse past float32": lambda x, w_r, y, i, s, r, n, p: routed(x, w_r, y * 1e-30, i) / 2.0**-140 + s,
    "a sum as another's shared expert": lambda x, w_r, y, i, s, r, n, p: (
        routed(x, w_r, y, i) + routed(x * 2, w_r, y * 2, i)
    ),
}


@pytest.mark.parametrize("verify", [False, True], ids=["", "verify"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_exact(name, dtype, verify):
    program, args = EXACT[name], layer(dtype)
    copies, given = ([t.clone() for t in args] for _ in range(2))
    with torch.no_grad():
        want = program(*copies)
        got = fusionpass.fuse(program, verify=verify)(*args)
    assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
    tolerance = {} if dtype is F32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(got, want, **tolerance)
    for x, y, before in zip(args, copies, given, strict=True):
        if torch.equal(y, before):  # what eager does not write is not written
            assert torch.equal(x, before)
        else:  # a cast of float32 to float32 is no copy
            assert dtype is F32
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("rules", [["finalize", "shared_add", "post_norm"], None])
def test_a_post_norm_behind_a_view_needs_the_residual(rules):
    def program(x, w_r, y, i, s, r, n, p):
        return r.view(2, 3, H) + norm((routed(x, w_r, y, i) + s.tanh()).view(2, 3, H), p)

    with torch.no_grad():
        (site,) = captured(program, *layer(), rules=rules, verify=True).rewrites
        assert ("post_norm" in site.stages) == (rules is None)
        torch.testing.assert_close(fusionpass.fuse(program, rules=rules)(*layer()), program(*layer()))


class Eps(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.RMSNorm(H, eps=1e-3).to(DEVICE)

    def forward(self, a, g, b):
        h = a + torch.sigmoid(g) * b
        return h, self.norm(h)


def test_an_eps_that_is_a_node():
    """dynamic=True makes a symbol of the eps of torch's norm; in a graph of symbolic_trace it may change with each call."""
    args = operands((T, H), (T, 1), (T, H))
    with torch.no_grad():
        module = Eps()
        compiled = torch.compile(module, dynamic=True, backend="fusionpass", options={"inner": "eager"})
        torch.testing.assert_close(compiled(*args), module(*args))

        def program(a, g, b, eps):
            h = a + torch.sigmoid(g) * b
            return h, F.rms_norm(h, (H,), None, eps)

        after, report = fusionpass.rewrite(torch.fx.symbolic_trace(program), [*args, 1e-5])
        assert [site.stages for site in report.rewrites] == [["gated_add"]]
        for eps in (1e-5, 1.0):
            torch.testing.assert_close(after(*args, eps), program(*args, eps))
