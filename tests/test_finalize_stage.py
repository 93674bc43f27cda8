"""The finalize of the routed experts: every spelling that joins a site, and every near miss with its code.

y is [T * K, H], w [T, K], i [T * K] a permutation, m [T, K] a mask; b [T, H], g [T, 1].
"""

from __future__ import annotations

import pytest
import torch
from programs import DEVICE, checked, operands
from stages_helpers import BF16, F32, H, K, S, T, check, flat
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import fusionpass


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
