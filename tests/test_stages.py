"""What a site grows over, stage by stage: every spelling that joins, and every near miss with its code."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from programs import (
    ALONE,
    DEVICE,
    WHOLE,
    assert_no_less_exact,
    checked,
    doubled,
    operands,
    stops,
    tensors,
    through_export,
    through_make_fx,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import fusionpass

S = torch.sigmoid
T, K, H = 6, 2, 8
BF16, F32 = torch.bfloat16, torch.float32


def check(function, args, tracer, joined, code=None, stage=None):
    """One site, grown over `joined`; `stage` stayed outside by `code`, or without a code each for want of a neighbour."""
    (site,) = checked(function, args, tracer)
    assert site.stages == [name for name in WHOLE if name in ("gated_add", *joined)]
    found = stops(site)
    alone = {"gate_projection": "not-a-projection"} | ALONE
    if code is None:
        assert found == {name: why for name, why in alone.items() if name not in joined}
    else:
        assert found[stage] == code
    return site


def flat(table):
    """(name, code) of a table of near misses by code; None: it joins, around what it does not know."""
    return [(name, code) for code, programs in table.items() for name in programs]


# finalize: y [T * K, H], w [T, K], i [T * K] a permutation, m [T, K] a mask; b [T, H], g [T, 1]


def routing(dtype=F32, top_k=K):
    y, w, b, g = operands((T * top_k, H), (T, top_k), (T, H), (T, 1), dtype=dtype)
    i = torch.randperm(T * top_k, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return [y, w, i, w > 0.5, b, g]


def col(w):
    return w.reshape(-1).unsqueeze(-1)


def rows(y):
    return y.view(T, -1, H)


def added(routed):
    """The site around a = routed(y, w, i, m), or routed itself where it is all of the program."""
    if routed.__code__.co_argcount != 4:
        return routed
    return lambda y, w, i, m, b, g: routed(y, w, i, m) + S(g) * b


def _leading_dims(y, w, i, m, b, g):
    a = (y * col(w))[i].view(2, T // 2, -1, H).sum(dim=2)
    return a + S(g.view(2, -1, 1)) * b.view(2, -1, H)


def _sum_written_into(y, w, i, m, b, g):
    a = (rows(y) * w[..., None]).sum(1)
    a += S(g) * b
    return a


FINALIZED = {
    "grouped_mm": lambda y, w, i, m: rows((y * col(w))[i]).sum(dim=1).to(y.dtype),
    "batched_mm": lambda y, w, i, m: rows(y * col(w)).sum(dim=1),
    "weights [T, K, 1]": lambda y, w, i, m: (rows(y) * w[..., None]).sum(-2),
    "weights first": lambda y, w, i, m: (w.unsqueeze(-1) * rows(y)).sum((1,)),
    "torch.sum, axis": lambda y, w, i, m: torch.sum(torch.mul(rows(y), w.unsqueeze(-1)), axis=1),
    "einsum": lambda y, w, i, m: torch.einsum("tk,tkh->th", w, rows(y)),
    "einsum, y first": lambda y, w, i, m: torch.einsum("tkh,tk->th", rows(y), w),
    "einsum, other letters": lambda y, w, i, m: torch.einsum("n e, n e d -> n d", w, rows(y)),
    "einsum of gathered": lambda y, w, i, m: torch.einsum("tk,tkh->th", w, rows(y[i])),
    "y widened": lambda y, w, i, m: (rows(y).float() * w.float()[..., None]).sum(1).to(y.dtype),
    "y widened before its view": lambda y, w, i, m: (rows(y.float()) * w.float()[..., None]).sum(1).to(y.dtype),
    "float32 weights": lambda y, w, i, m: (rows(y) * w.float()[..., None]).sum(1).to(y.dtype),
    "sum in float32": lambda y, w, i, m: (rows(y) * w[..., None]).sum(1, dtype=F32).to(y.dtype),
    "index_select": lambda y, w, i, m: rows((y * col(w)).index_select(0, i)).sum(1),
    "int32 index": lambda y, w, i, m: rows((y * col(w))[i.int()]).sum(1),
    "gathered before": lambda y, w, i, m: (rows(y[i]) * w[..., None]).sum(1),
    "gathered before, widened": lambda y, w, i, m: (rows(y[i]).float() * w[..., None]).sum(1).to(y.dtype),
    "transposed weights": lambda y, w, i, m: rows(y * w.t().contiguous().t().reshape(-1, 1)).sum(1),
    "masked experts": lambda y, w, i, m: rows((y.masked_fill(col(m), 0.0) * col(w))[i]).sum(1),
    "masked experts in order": lambda y, w, i, m: (rows(y).masked_fill(m[..., None], 0) * w[..., None]).sum(1),
    "masked, then gathered": lambda y, w, i, m: (rows(y.masked_fill(col(m), 0)[i]) * w[..., None]).sum(1),
    "gathered, then masked": lambda y, w, i, m: (rows(y[i].masked_fill(col(m), 0)) * w[..., None]).sum(1),
    "masked and widened": lambda y, w, i, m: rows(y.masked_fill(col(m), 0).float() * col(w)).sum(1).to(y.dtype),
    "leading dims": _leading_dims,
    "a is written into": _sum_written_into,
    "float32 y": lambda y, w, i, m: (rows(y).float().cos() * w[..., None]).sum(1).to(y.dtype),
    "float16 y": lambda y, w, i, m: (rows(y.half().cos()) * w[..., None]).sum(1).to(y.dtype),
    "float16 weights": lambda y, w, i, m: (rows(y) * w.half()[..., None]).sum(1).to(y.dtype),
    "float32 y and weights": lambda y, w, i, m: rows((y.float().cos() * col(w.float().cos()))[i]).sum(1).to(y.dtype),
    "the sum stays in float32": lambda y, w, i, m: (rows(y).float().cos() * w[..., None]).sum(1),
}


@pytest.mark.parametrize(("tracer", "dtype"), [("dynamo", F32), ("dynamo", BF16), ("fake", BF16)], ids=str)
@pytest.mark.parametrize("name", FINALIZED)
def test_finalize(name, tracer, dtype):
    function = added(FINALIZED[name])
    if tracer == "fake" and name.startswith("einsum"):  # which make_fx takes apart into a batched product
        check(function, routing(dtype), tracer, [], "not-a-finalize", "finalize")
    else:
        check(function, routing(dtype), tracer, ["finalize"])


@pytest.mark.parametrize("nan_in", ["y", "w"])
@pytest.mark.parametrize("name", [name for name in FINALIZED if "masked" in name])
def test_masked_rows_hold_anything(name, nan_in):
    """What the experts elsewhere left in y is never looked at; a weight that is no number makes one of zero, as in eager."""
    y, w, i, m, b, g = args = routing()
    by_position = name == "gathered, then masked" and nan_in == "y"
    (y.view(T, K, H) if nan_in == "y" else w)[m.view(-1)[i.argsort()].view(T, K) if by_position else m] = float("nan")
    want = added(FINALIZED[name])(*args)
    with fusionpass.collect() as report:
        got = fusionpass.fuse(added(FINALIZED[name]))(*args)
    assert [site.stages for site in report.rewrites] == [["finalize", "gated_add"]]
    assert want.isnan().any() == (nan_in == "w")
    torch.testing.assert_close(got, want, equal_nan=True)


def _cast_read_twice(y, w):
    w = w.to(y.dtype)
    return rows(y * col(w)).sum(1), w


def _cast_then_written(y, w):
    w = w.clone()
    rounded = w.to(y.dtype)
    w.zero_()
    return rows(y * col(rounded)).sum(1), w


def _cast_elsewhere(y, w):
    with torch.no_grad():
        w = w.to(y.dtype)
    return rows(y * col(w)).sum(1)


WEIGHTS_CAST = {  # -> what the op is given
    "as a router does": (lambda y, w: rows(y * col(w.to(y.dtype))).sum(1), F32),
    "after the views": (lambda y, w: (rows(y) * w[..., None].to(y.dtype)).sum(1), F32),
    "before an index": (lambda y, w: (rows(y) * w.to(y.dtype)[..., None]).sum(1), F32),
    "einsum": (lambda y, w: torch.einsum("tk,tkh->th", w.to(y.dtype), rows(y)), F32),
    "read twice": (_cast_read_twice, BF16),
    "written after it": (_cast_then_written, BF16),
    "in another grad mode": (_cast_elsewhere, BF16),
    "from float64": (lambda y, w: rows(y * col(w.double().to(y.dtype))).sum(1), BF16),
    "from float16": (lambda y, w: rows(y * col(w.half().to(y.dtype))).sum(1), BF16),
}


@pytest.mark.parametrize(("routed", "dtype"), WEIGHTS_CAST.values(), ids=WEIGHTS_CAST)
def test_weights_are_read_as_they_were_before_a_cast(routed, dtype):
    y, w, _, _, b, g = routing(BF16)
    given = []

    def function(y, w, b, g):
        found = routed(y, w)
        a, *others = found if isinstance(found, tuple) else (found,)
        return a + S(g) * b, *others

    def inner(graph_module, inputs):
        given.extend(node for node in graph_module.graph.nodes if node.op == "call_function")
        return graph_module

    checked(function, [y, w.float(), b, g], "dynamo")
    fusionpass.fuse(function, inner=inner)(y, w.float(), b, g)
    (op,) = (node for node in given if node.target is torch.ops.fusionpass.moe_combine.default)
    assert op.kwargs["topk_weights"].meta["example_value"].dtype == dtype


@pytest.mark.parametrize(("top_k", "code"), [(1, None), (32, None), (33, "top-k")])
def test_number_of_terms(top_k, code):
    function = added(FINALIZED["grouped_mm"])
    check(function, routing(top_k=top_k), "dynamo", [] if code else ["finalize"], code, "finalize")


def _masked_in_place(y, w, i, m, b, g):
    p = y * col(w)
    p.masked_fill_(col(m), 0.0)
    return rows(p).sum(1) + S(g) * b


def _transposed_in_place(y, w, i, m, b, g):
    """Twice, so that y is what it was; what was recorded of it in between was not."""
    y = y.clone()
    y.t_()
    y.t_()
    return rows((y * col(w))[i]).sum(1) + S(g) * b


def _written(index):
    """One of y, w, i, m is overwritten after its last read."""

    def function(y, w, i, m, b, g):
        copies = [t.clone() for t in (y, w, i, m)]
        y, w, i, m = copies
        p = (y.masked_fill(col(m), 0) * col(w))[i]
        copies[index].zero_()
        return rows(p).sum(1) + S(g) * b, copies[index]

    return function


def _weights_written_after_their_copy(y, w, i, m, b, g):
    w = w.t().contiguous()
    flat = w.t().reshape(-1, 1)  # another order than memory's: a copy
    w.mul_(2)
    return rows(y * flat).sum(1) + S(g) * b, w


def _no_grad_product(y, w, i, m, b, g):
    with torch.no_grad():
        p = rows(y) * w[..., None]
    return p.sum(1) + S(g) * b


NOT_FINALIZED = {
    "not-a-finalize": {
        "masked product": lambda y, w, i, m: rows((y * col(w)).masked_fill(col(m), 0)).sum(1),
        "where": lambda y, w, i, m: torch.where(m[..., None], 0.0, rows(y) * w[..., None]).sum(1),
        "sum over another dim": lambda y, w, i, m: (y * col(w)).view(-1, T, H).sum(0),
        "keepdim": lambda y, w, i, m: (rows(y) * w[..., None]).sum(1, keepdim=True).squeeze(1),
        "mean": lambda y, w, i, m: (rows(y) * w[..., None]).mean(1),
        "sum in float64": lambda y, w, i, m: (rows(y) * w[..., None]).sum(1, dtype=torch.float64).to(y.dtype),
        "float64 y": lambda y, w, i, m: (rows(y).double() * w[..., None]).sum(1).to(y.dtype),
        "float64 weights": lambda y, w, i, m: (rows(y) * w.double()[..., None]).sum(1).to(y.dtype),
        "sum in float16": lambda y, w, i, m: (rows(y) * w[..., None]).sum(1, dtype=torch.float16).to(y.dtype),
        "no product": lambda y, w, i, m: rows(y).sum(1),
        "H weights a row": lambda y, w, i, m: (rows(y) * rows(y.cos())).sum(1),
        "einsum of something else": lambda y, w, i, m: torch.einsum("kt,tkh->th", w.t(), rows(y)),
    },
    None: {  # the mask is a neighbour like any other: what it leaves is y
        "masked element by element": lambda y, w, i, m: rows(y.masked_fill(y > 1, 0) * col(w)).sum(1),
        "masked by ones": lambda y, w, i, m: rows(y.masked_fill(col(m), 1.0) * col(w)).sum(1),
    },
    "used-elsewhere": {
        "masked in place": _masked_in_place,
        "sum read twice": lambda y, w, i, m, b, g: ((a := rows(y * col(w)).sum(1)) + S(g) * b, a),
        "product read twice": lambda y, w, i, m, b, g: (rows(p := y * col(w)).sum(1) + S(g) * b, p),
    },
    "shape": {"fewer rows than terms": lambda y, w, i, m: rows(y[:T][i % T] * col(w)).sum(1)},
    "dtype": {
        "int64 y": lambda y, w, i, m: (rows(y.long()) * w[..., None]).sum(1),
        "int64 weights": lambda y, w, i, m: (rows(y) * m[..., None].long()).sum(1),
        "bool weights": lambda y, w, i, m: (rows(y) * m[..., None]).sum(1),
    },
    "mutation-between": {f"{name} written": _written(index) for index, name in enumerate("ywim")}
    | {"weights written after their copy": _weights_written_after_their_copy},
    "metadata-mutation": {"y transposed in place": _transposed_in_place},
    "state-change-between": {"no_grad around the product": _no_grad_product},
    "gate-columns": {"one gate per column": lambda y, w, i, m, b, g: rows(y * col(w)).sum(1) + S(b * 2) * b},
}
# make_fx records no grad mode, a copying reshape as a clone, and after a write the written node in the place of the old.
UNDER_MAKE_FX = {
    "no_grad around the product": None,
    "weights written after their copy": None,
    "masked in place": "not-a-finalize",
}


@pytest.mark.parametrize("tracer", ["dynamo", "fake"])
@pytest.mark.parametrize(("name", "code"), flat(NOT_FINALIZED))
def test_not_finalize(name, code, tracer):
    function = added(NOT_FINALIZED[code][name])
    code = UNDER_MAKE_FX.get(name, code) if tracer == "fake" else code
    check(function, routing(BF16), tracer, [] if code else ["finalize"], code, "finalize")


@pytest.mark.parametrize(("dtype", "code"), [(torch.bool, "not-a-finalize"), (torch.uint8, "dtype")], ids=str)
@pytest.mark.filterwarnings("ignore:.*indexing with dtype torch.uint8.*")
def test_an_index_that_is_a_mask(dtype, code):
    """Both dtypes select rows; Dynamo has no graph for that, since their number depends on the data."""
    args = routing()
    args[2] = torch.ones(T * K, dtype=dtype, device=DEVICE)
    check(added(FINALIZED["grouped_mm"]), args, "real", [], code, "finalize")


# residual: the program is res(r, s) of s = a + S(g) * b


def combined(res):
    return res if res.__code__.co_argcount != 2 else lambda a, b, g, r: res(r, a + S(g) * b)


def sums(dtype=F32):
    return operands((T, H), (T, H), (T, 1), (T, H), dtype=dtype)


def halves(t):
    return t.view(2, -1, H)


ADDED = {
    "residual first": lambda r, s: r + s,
    "residual last": lambda r, s: s + r,
    "view": lambda r, s: halves(r) + halves(s),
    "reshape": lambda r, s: s.reshape(T, 1, H) + r.reshape(T, 1, H),
    "unsqueeze, flatten": lambda r, s: r + s.unsqueeze(0).flatten(0, 1),
    "index of a new dim": lambda r, s: r[None] + s[None, ...],
    "index of all": lambda r, s: r + s[:],
    "no-op contiguous": lambda r, s: r + s.contiguous(),
    "no-op to": lambda r, s: r + s.to(r.dtype),
    "torch.add, alpha=1": lambda r, s: torch.add(r, s, alpha=1),
    "keywords": lambda r, s: torch.add(input=s, other=r),
    "method": lambda r, s: r.add(s),
    "several later readers": lambda r, s: ((o := r + s), o * 2, o.amax(-1)),
    "strided residual": lambda r, s: s + r.t().contiguous().t(),
    "sum += r": lambda r, s: s.add_(r),
    "view of the sum += r": lambda r, s: halves(s).add_(halves(r)),
}


@pytest.mark.parametrize(("tracer", "dtype"), [("dynamo", F32), ("dynamo", BF16), ("fake", BF16)], ids=str)
@pytest.mark.parametrize("name", ADDED)
def test_residual(name, tracer, dtype):
    site = check(combined(ADDED[name]), sums(dtype), tracer, ["residual"])
    assert site.kernels_after == 1


def _into_a_copy(a, b, g, r):
    r = r * 1
    r += a + S(g) * b
    return r


def _into_an_input(a, b, g, r):
    r += a + S(g) * b
    return r, r[0]


def _into_a_copy_that_others_read(a, b, g, r):
    r = r * 1
    view = r[:, ::2]
    r += a + S(g) * b
    return r, view


def _into_an_operand(a, b, g, r):
    b += a + S(g) * b
    return b, r


def _into_the_same_memory(a, b, g, r):
    rows = halves(r)
    rows += halves(a + S(g) * b)
    return rows, r


INTO = (_into_a_copy, _into_an_input, _into_a_copy_that_others_read, _into_an_operand, _into_the_same_memory)


@pytest.mark.parametrize("tracer", ["dynamo", "make_fx", "export"])
@pytest.mark.parametrize("function", INTO)
def test_a_residual_that_is_written_into(function, tracer):
    """What the op gives is copied into the residual's memory: results and inputs share what they share in eager."""

    def shared(results, args):
        memory = [t.untyped_storage()._cdata for t in (*results, *args)]
        return [memory.index(key) for key in memory]

    def run(program):
        args = sums()
        return (results := tensors(program(*args))), args, shared(results, args)

    results, inputs, memory = run(function)
    if tracer == "dynamo":
        with fusionpass.collect() as report:
            got, args, found = run(fusionpass.fuse(lambda *given: function(*given)))
    else:
        program, report = (through_make_fx if tracer == "make_fx" else through_export)(function, *sums())
        got, args, found = run(program if tracer == "make_fx" else program.module())
    assert [site.stages for site in report.rewrites] == [["gated_add", "residual"]]
    assert found == memory
    assert [t.stride() for t in got] == [t.stride() for t in results]
    torch.testing.assert_close([*got, *args], [*results, *inputs])


def _out(a, b, g, r):
    out = torch.empty_like(r)
    torch.add(r, a + S(g) * b, out=out)
    return out


def _written_before_the_add(index):
    def function(a, b, g, r):
        copies = [t.clone() for t in (a, b, g)]
        a, b, g = copies
        s = a + S(g) * b
        copies[index].zero_()
        return r + s, copies[index]

    return function


def _no_grad_sum(a, b, g, r):
    with torch.no_grad():
        s = a + S(g) * b
    return r + s


NOT_ADDED = {
    "scaled": {"alpha=2": lambda r, s: torch.add(r, s, alpha=2)},
    "out-argument": {"out=": _out},
    "shape": {
        "[1, H] residual": lambda r, s: r[:1] + s,
        "0-d residual": lambda r, s: r[0, 0] + s,
        "sum broadcast": lambda r, s: torch.stack([r, r]) + s,
        "cut rows": lambda r, s: r.view(2 * T, -1) + s.view(2 * T, -1),
        "joined rows": lambda r, s: r.view(T // 2, -1) + s.view(T // 2, -1),
    },
    "dtype": {"float64 residual": lambda r, s: r.double() + s},
    "used-elsewhere": {
        "sum read twice": lambda r, s: (r + s, s),
        "view read twice": lambda r, s: (halves(r) + (v := halves(s)), v),
        "sum += r, its view is read": lambda r, s: ((v := s[0]), s.add_(r), v),
        "view of the sum += r, the sum is read": lambda r, s: (halves(s).add_(halves(r)), s),
    },
    "not-a-residual": {
        "added to itself": lambda r, s: s + s,
        "scalar": lambda r, s: s + 1.0,
        "subtracted": lambda r, s: r - s,
        "cast between": lambda r, s: r.double() + s.double(),
        "transposed between": lambda r, s: r.t() + s.t(),
        "some rows": lambda r, s: r[1:] + s[1:],
    },
    "stride": {"transposed result": lambda r, s: r.t().contiguous().t() + s},
    "mutation-between": {f"{name} written": _written_before_the_add(index) for index, name in enumerate("abg")},
    "state-change-between": {"no_grad around the sum": _no_grad_sum},
}


@pytest.mark.parametrize(("name", "code"), flat(NOT_ADDED))
def test_not_residual(name, code):
    check(combined(NOT_ADDED[code][name]), sums(), "dynamo", [], code, "residual")


def test_a_sum_that_another_site_adds_to():
    first, second = checked(lambda a, b, g, r: r + S(g) * a + S(b[:, :1]) * b, sums(), sites=2)
    assert (stops(first)["residual"], stops(second)["residual"]) == ("another-sum", "not-a-residual")


def test_an_operand_of_the_projection_is_written_before_the_residual_add():
    def function(x, w, a, b, r):
        x = x.clone()
        s = a + S(F.linear(x, w)) * b
        x.mul_(2)
        return r + s, x

    args = operands((T, H), (1, H), (T, H), (T, H), (T, H))
    check(function, args, "dynamo", ["gate_projection"], "mutation-between", "residual")


# rms_norm: the program is (o, norm(o, w)) of o = r + (a + S(g) * b)


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


def test_indices_on_the_cpu_stay_outside():
    """Eager takes them from there for rows on a GPU; the op would raise. Meta tensors stand in for these."""

    def function(y, w, i, b, g):
        return rows((y * col(w))[i]).sum(1) + S(g) * b

    graph_module = torch.fx.symbolic_trace(function)
    stopped = {}
    for device in ("meta", "cpu"):
        with FakeTensorMode() as mode:
            made = [torch.empty(shape, device="meta") for shape in ((T * K, H), (T, K), (T, H), (T, 1))]
            y, w, b, g = made
            i = torch.zeros(T * K, dtype=torch.int64, device=device)
        FakeTensorProp(graph_module, mode).propagate(y, w, i, b, g)
        with torch.no_grad():
            report = fusionpass.rewrite(graph_module).report
        stopped[device] = {stop["stage"]: stop["code"] for stop in report.rewrites[0].stopped}
    assert "finalize" not in stopped["meta"]
    assert stopped["cpu"]["finalize"] == "device"
