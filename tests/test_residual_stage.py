"""The residual: every spelling of res(r, s) that joins a site's s = a + S(g) * b, and every near miss with its code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from programs import checked, operands, stops, tensors, through_export, through_make_fx
from stages_helpers import BF16, F32, H, S, T, check, flat, sums

import fusionpass


def combined(res):
    return res if res.__code__.co_argcount != 2 else lambda a, b, g, r: res(r, a + S(g) * b)


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
