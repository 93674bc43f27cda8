"""Every near miss of the formula is refused with its own code, and runs as it did."""

import pytest
import torch
import torch.nn.functional as F
from programs import abg, captured, fresh, operands

import fusionpass

S = torch.sigmoid


def _out(a, b, g):
    out = torch.empty_like(a)
    torch.add(a, S(g) * b, out=out)
    return out


def _b_zeroed(a, b, g):
    b = b + 0
    m = S(g) * b
    b.zero_()
    return a + m


def _g_written(a, b, g):
    g = g + 0
    s = S(g)
    g.add_(3)
    return a + s * b


def _sigmoid_written(a, b, g):
    s = S(g)
    s.mul_(0.5)
    return a + s * b


def _b_written_through_view(a, b, g):
    b = b + 0
    m = S(g) * b
    b.view(-1).mul_(0)
    return a + m


def _b_setitem(a, b, g):
    b = b + 0
    m = S(g) * b
    b[0] = 0
    return a + m


def _b_written_by_out(a, b, g):
    b = b + 0
    m = S(g) * b
    torch.mul(a, 2, out=b)
    return a + m


def _iadd_on_input(a, b, g):
    a += S(g) * b
    return a


def _iadd_seen_later(a, b, g):
    a = a * 2
    view = a[:, ::2]
    a += S(g) * b
    return a, view


def _mul_in_place(a, b, g):
    b *= S(g)
    return a + b


def _mul_in_place_seen_later(a, b, g):
    b = b * 1
    view = b[:, ::2]
    b *= S(g)
    return a + b, view


def _input_written(a, b, g):
    m = S(g) * b
    a.mul_(2)
    return a + m


def _sigmoid_in_place(a, b, g):
    g = g + 0
    s = g.sigmoid_()
    return a + s * b, g


def _no_grad_between(a, b, g):
    with torch.no_grad():
        m = S(g) * b
    return a + m


def _metadata(a, b, g):
    a = a + 0
    a.t_()
    a.t_()
    return a + S(g) * b


def _product_read_twice(a, b, g):
    m = S(g) * b
    return a + m, m


# name -> program, code at Dynamo's level, sizes
REFUSES = {
    "alpha 2": (lambda a, b, g: torch.add(a, S(g) * b, alpha=2), "scaled"),
    "addcmul value 2": (lambda a, b, g: torch.addcmul(a, S(g), b, value=2), "scaled"),
    "scaled sigmoid": (lambda a, b, g: a + 2 * S(g) * b, "scaled"),
    "out=": (_out, "out-argument"),
    "scalar a": (lambda a, b, g: 1e-3 + S(g) * b, "scalar-operand"),
    "scalar b": (lambda a, b, g: a + 16 * S(b), "scalar-operand"),
    "product read twice": (_product_read_twice, "multi-use"),
    "product added to itself": (lambda a, b, g: (m := S(g) * b) + m, "multi-use"),
    "view between": (lambda a, b, g: a.view(-1) + (S(g) * b).flatten(), "view-between"),
    "cast of the product": (lambda a, b, g: a.double() + (S(g) * b).double(), "cast-between"),
    "cast of the sigmoid": (lambda a, b, g: a + S(g).double() * b, "cast-between"),
    "detach between": (lambda a, b, g: a + (S(g) * b).detach(), "view-between"),
    "gate is a slice of the sigmoid": (lambda a, b, g: a + S(b).chunk(2, 1)[0].repeat(1, 2) * b, None),
    "select of the sigmoid": (lambda a, b, g: a + S(b)[:, :1] * b, "view-between"),
    "a broadcasts up": (lambda a, b, g: a[0] + S(g) * b, "shape"),
    "b broadcasts up": (lambda a, b, g: a + S(a) * b[:, :1], "shape"),
    "gate broadcasts the sum up": (lambda a, b, g: a[:1] + S(g) * b[:1], "shape"),
    "mixed dtype, a": (lambda a, b, g: a.double() + S(g) * b, "mixed-dtype"),
    "mixed dtype, gate": (lambda a, b, g: a + S(g.double()) * b, "mixed-dtype"),
    "mixed dtype, 0-d gate": (lambda a, b, g: a + S(g[0, 0].half()) * b, "mixed-dtype"),
    "transposed sigmoid": (lambda a, b, g: a + S(g.t()).t() * b, "view-between"),
    "transposed product": (lambda a, b, g: a.t() + (S(g) * b).t(), "view-between"),
    "permuted product": (lambda a, b, g: a.t() + (S(g) * b).permute(1, 0), "view-between"),
    "factor behind the product": (lambda a, b, g: a + (S(g) * b) * 0.5, "scaled"),
    "mask behind the product": (lambda a, b, g: a + (S(g) * b) * (b > 0), "scaled"),
    "mask of the sigmoid": (lambda a, b, g: a + S(g) * (g > 0) * b, "scaled"),
    "double": (lambda a, b, g: a.double() + S(g.double()) * b.double(), "dtype"),
    "complex b": (lambda a, b, g: a + S(g) * b.to(torch.complex64), "mixed-dtype"),
    "0-d gate": (lambda a, b, g: a + S(g[0, 0]) * b, "zero-dim"),
    "b zeroed": (_b_zeroed, "mutation-between"),
    "gate written": (_g_written, "mutation-between"),
    "b written through a view": (_b_written_through_view, "mutation-between"),
    "sigmoid written": (_sigmoid_written, "mutation-between"),
    "b setitem": (_b_setitem, "mutation-between"),
    "b written by out=": (_b_written_by_out, "mutation-between"),
    "+= on an input": (_iadd_on_input, "in-place-visible"),
    "+= seen through a view": (_iadd_seen_later, "in-place-visible"),
    "product in place": (_mul_in_place, "in-place"),
    "product in place, seen through a view": (_mul_in_place_seen_later, "in-place"),
    "another input written": (_input_written, "mutation-between"),
    "sigmoid in place": (_sigmoid_in_place, "in-place"),
    "no_grad around the product": (_no_grad_between, "state-change-between"),
    "metadata mutation": (_metadata, "metadata-mutation"),
    "stride": (lambda a, b, g: (S(g) * b.t().contiguous().t()) + a, "stride"),
    "dropout between": (lambda a, b, g: a + F.dropout(S(g) * b, 0.5, True), "dropout-between"),
    "lerp": (lambda a, b, g: torch.lerp(a, b, S(g)), "other-form"),
    "glu": (lambda a, b, g: a + F.glu(torch.cat((b, g.expand_as(b)), -1)), "other-form"),
    "einsum": (lambda a, b, g: a + torch.einsum("to,th->th", S(g), b), "other-form"),
    "index_add": (
        lambda a, b, g: torch.index_add(a, 0, torch.arange(4, device=a.device), S(g) * b),
        "other-form",
    ),
    # look-alikes, which are no near misses at all
    "hardsigmoid": (lambda a, b, g: a + F.hardsigmoid(g) * b, None),
    "logsigmoid": (lambda a, b, g: a + F.logsigmoid(g) * b, None),
    "tanh": (lambda a, b, g: a + torch.tanh(g) * b, None),
    "sub": (lambda a, b, g: a - S(g) * b, None),
    "silu": (lambda a, b, g: a + F.silu(b), None),
}


@pytest.mark.parametrize(("function", "code"), REFUSES.values(), ids=REFUSES)
def test_refused(function, code):
    args = abg()
    torch.manual_seed(0)
    expected = function(*fresh(args))
    report = captured(function, *fresh(args))
    assert not report.rewrites
    assert [miss.code for miss in report.misses] == ([] if code is None else [code])
    assert all(miss.reason and "{}" not in miss.reason for miss in report.misses)
    torch._dynamo.reset()
    inputs = fresh(args)
    torch.manual_seed(0)
    got = fusionpass.fuse(lambda *x: function(*x))(*inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_number_that_dynamo_keeps_symbolic_is_a_scalar_operand():
    reports = []

    def backend(graph_module, example_inputs):
        reports.append(fusionpass.rewrite(graph_module).report)
        return graph_module

    torch.compile(lambda b, eps: eps + S(b) * b, backend=backend, dynamic=True)(operands((4, 8))[0], 1e-4)
    assert [miss.code for miss in reports[0].misses] == ["scalar-operand"]
