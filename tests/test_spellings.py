"""Every spelling of the formula is rewritten, whatever traces it; every near miss is refused with its own code."""

import operator
import re
from contextlib import nullcontext
from functools import reduce
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from programs import (
    ALONE,
    DEVICE,
    abg,
    assert_no_less_exact,
    captured,
    checked,
    doubled,
    fresh,
    operands,
    stops,
    through_export,
    through_make_fx,
)

import fusionpass
from fusionpass.rules import catalog

S = torch.sigmoid


class Written(torch.nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.gate = gate

    def forward(self, a, b, g):
        return a + self.gate(g) * b


def _keyword_add(a, b, g):
    return torch.add(input=a, other=torch.mul(input=b, other=S(input=g)))


def _owned_iadd(a, b, g):
    a = a * 2
    a += S(g) * b
    return a


def _owned_add_(a, b, g):
    return (a * 2).add_(S(g) * b)


def _owned_addcmul_(a, b, g):
    return (a * 2).addcmul_(S(g), b)


def _product_in_place(a, b, g):
    b = b * 1
    b *= S(g)
    return a + b


def _sum_in_the_product(a, b, g):
    p = S(g) * b
    p += a
    return p


def _sigmoid_in_place_of_a_copy(a, b, g):
    return a + (g * 1).sigmoid_() * b


REWRITES = {
    "as written": lambda a, b, g: a + S(g) * b,
    "add swapped": lambda a, b, g: S(g) * b + a,
    "mul swapped": lambda a, b, g: a + b * S(g),
    "both swapped": lambda a, b, g: b * S(g) + a,
    "F.sigmoid": lambda a, b, g: a + F.sigmoid(g) * b,
    "expit": lambda a, b, g: a + torch.special.expit(g) * b,
    "method sigmoid": lambda a, b, g: a + g.sigmoid() * b,
    "nn.Sigmoid": Written(torch.nn.Sigmoid()),
    "torch.add, torch.mul": lambda a, b, g: torch.add(a, torch.mul(S(g), b)),
    "torch.multiply": lambda a, b, g: a + torch.multiply(b, S(g)),
    "keyword arguments": _keyword_add,
    "methods": lambda a, b, g: a.add(b.mul(S(g))),
    "multiply method": lambda a, b, g: a.add(b.multiply(S(g))),
    "operator": lambda a, b, g: operator.add(a, operator.mul(S(g), b)),
    "dunder": lambda a, b, g: (S(g).__mul__(b)).__radd__(a),
    "alpha 1": lambda a, b, g: torch.add(a, S(g) * b, alpha=1),
    "addcmul": lambda a, b, g: torch.addcmul(a, S(g), b),
    "addcmul swapped": lambda a, b, g: torch.addcmul(a, b, S(g)),
    "addcmul method": lambda a, b, g: a.addcmul(S(g), b, value=1),
    "aten overloads": lambda a, b, g: torch.ops.aten.add.Tensor(
        a, torch.ops.aten.mul.Tensor(torch.ops.aten.sigmoid.default(g), b)
    ),
    "+= on a temporary": _owned_iadd,
    "add_ on a temporary": _owned_add_,
    "addcmul_ on a temporary": _owned_addcmul_,
    "product in place": _product_in_place,
    "sum in the product": _sum_in_the_product,
    "sigmoid in place of a temporary": _sigmoid_in_place_of_a_copy,
    "dropout that is off": lambda a, b, g: a + F.dropout(S(g) * b, 0.5, training=False),
    "dropout of the sigmoid that is off": lambda a, b, g: a + F.dropout(S(g), 0.5, False) * b,
    "index that adds a dim": lambda a, b, g: a + S(g[:, 0])[..., None] * b,
    "unsqueeze of the sigmoid": lambda a, b, g: a + S(g[:, 0]).unsqueeze(-1) * b,
    "view of the sigmoid": lambda a, b, g: a + S(g[:, 0]).view(-1, 1) * b,
    "reshape of the sigmoid": lambda a, b, g: a + S(g.t()).reshape(-1, 1) * b,
    "expand_as of the sigmoid": lambda a, b, g: a + S(g).expand_as(b) * b,
    "expand of the sigmoid": lambda a, b, g: a + S(g).expand(4, 8) * b,
    "view of the product": lambda a, b, g: a.view(2, 2, 8) + (S(g) * b).view(2, 2, 8),
    "unsqueeze of the product": lambda a, b, g: a.unsqueeze(1) + (S(g) * b).unsqueeze(1),
    "b is a temporary": lambda a, b, g: a + S(g) * (b * 3),
    "no-op cast between": lambda a, b, g: a + (S(g) * b).to(a.dtype),
    "no-op contiguous between": lambda a, b, g: a + S(g).contiguous() * b,
    "sigmoid read twice": lambda a, b, g: (a + S(g) * b, S(g).mean()),
    "silu of b": lambda a, b, g: a + b * S(b),
    "a is b": lambda a, b, g: b + S(g) * b,
    "scaled b": lambda a, b, g: a + (b * 2) * S(g),
    "factor of three": lambda a, b, g: a + b * 2 * S(g),
}


@pytest.mark.parametrize("name", REWRITES)
@pytest.mark.parametrize("tracer", ["dynamo", "make_fx", "export"])
def test_rewritten(name, tracer):
    function = REWRITES[name]
    args = abg()
    expected = function(*fresh(args))
    if tracer == "dynamo":
        report = captured(function, *fresh(args))
        got = fusionpass.fuse(lambda *x: function(*x))(*fresh(args))
    else:
        way = through_make_fx if tracer == "make_fx" else through_export
        rewritten = way(function, *fresh(args))
        report = rewritten.report
        program = rewritten.graph_module
        got = (program.module() if tracer == "export" else program)(*fresh(args))
    assert [r.rule for r in report.rewrites] == ["gated_add"]
    assert report.misses == []
    torch.testing.assert_close(got, expected)


GATES = {
    "[T, 1]": (4, 1),
    "[T, H]": (4, 8),
    "[H]": (8,),
    "[1, 1]": (1, 1),
    "[1, H]": (1, 8),
}


@pytest.mark.parametrize("shape", GATES.values(), ids=GATES)
def test_gate_shapes(shape):
    a, b, gate = operands((4, 8), (4, 8), shape)
    report = captured(REWRITES["as written"], a, b, gate)
    assert len(report.rewrites) == 1
    torch.testing.assert_close(fusionpass.fuse(lambda a, b, g: a + S(g) * b)(a, b, gate), a + S(gate) * b)


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


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
MIXED = {
    "float32 a": (F32, BF16, BF16),
    "float32 b": (BF16, F32, BF16),
    "float32 gate": (BF16, BF16, F32),
    "float16 a": (F16, BF16, BF16),
    "float16 gate": (BF16, BF16, F16),
    "float16, and float32 gate": (F16, F16, F32),
    "all three": (F16, BF16, F32),
}


def mixed(dtypes):
    return [tensor.to(dtype) for tensor, dtype in zip(abg(), dtypes, strict=True)]


@pytest.mark.parametrize("dtypes", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("tracer", ["dynamo", "fake"])
def test_mixed_dtypes(dtypes, tracer):
    """Computed in float32 and rounded once, to what the operands promote to."""
    function, args = REWRITES["as written"], mixed(dtypes)
    a, b, g = (tensor.float() for tensor in args)
    with fusionpass.collect():
        got = fusionpass.fuse(lambda *given: function(*given))(*args)
    assert got.dtype == reduce(torch.promote_types, dtypes)
    torch.testing.assert_close(got, (a + S(g) * b).to(got.dtype))
    checked(function, args, tracer)


@pytest.mark.parametrize("dtypes", MIXED.values(), ids=MIXED)
def test_mixed_dtypes_in_eagers_numerics(dtypes):
    function, args = REWRITES["as written"], mixed(dtypes)
    report = captured(function, *args, numerics="eager")
    assert ([miss.code for miss in report.misses], report.rewrites) == (["mixed-dtype"], [])
    torch._dynamo.reset()
    got = fusionpass.fuse(lambda *given: function(*given), numerics="eager")(*args)
    torch.testing.assert_close(got, function(*args), rtol=0, atol=0)
    apart = [*args[:2], torch.cat([args[2]] * 4, 1)[:, 2:3]]  # of no plain strides: the op itself is asked for its own
    report = captured(function, *apart, numerics="eager")
    assert ([miss.code for miss in report.misses], report.rewrites) == (["mixed-dtype"], [])


def _autocast():
    return torch.autocast(DEVICE, BF16)


@pytest.mark.parametrize("tracer", ["dynamo", "make_fx", "export"])
@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside, tracer):
    """The projection joins, since autocast casts for it alone; the result has the dtype that eager's has."""

    def projected(x, w, a, b):
        return a + S(F.linear(x, w)) * F.linear(b, b)

    def function(*args):
        with _autocast() if inside else nullcontext():
            return projected(*args)

    args = operands((8, 6), (1, 6), (8, 8), (8, 8))
    truth = projected(*doubled(args))
    with nullcontext() if inside else _autocast():
        want = function(*args)
        if tracer == "dynamo":
            with fusionpass.collect() as report:
                got = fusionpass.fuse(lambda *given: function(*given))(*args)
        else:
            program, report = (through_make_fx if tracer == "make_fx" else through_export)(function, *args)
            got = (program if tracer == "make_fx" else program.module())(*args)
    assert ([site.stages for site in report.rewrites], report.misses) == ([["gate_projection", "gated_add"]], [])
    assert_no_less_exact([got], [want], [truth], BF16)


def test_gradients_under_autocast():
    """They are those of eager's nodes but for roundings to bfloat16: no farther from the truth than eager's."""

    def function(x, w, a, b):
        return a + S(F.linear(x, w)) * F.linear(b, b)

    def gradients(program, args, around):
        leaves = [arg.detach().requires_grad_() for arg in args]
        with around:
            result = program(*leaves)
        return torch.autograd.grad(result, leaves, torch.ones_like(result))

    args = operands((8, 6), (1, 6), (8, 8), (8, 8))
    with fusionpass.collect() as report:
        got = gradients(fusionpass.fuse(lambda *given: function(*given)), args, _autocast())
    assert [site.stages for site in report.rewrites] == [["gate_projection", "gated_add"]]
    want, truth = gradients(function, args, _autocast()), gradients(function, doubled(args), nullcontext())
    assert_no_less_exact(got, want, truth, BF16)


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


def test_a_number_that_dynamo_keeps_symbolic_is_a_scalar_operand():
    reports = []

    def backend(graph_module, example_inputs):
        reports.append(fusionpass.rewrite(graph_module).report)
        return graph_module

    torch.compile(lambda b, eps: eps + S(b) * b, backend=backend, dynamic=True)(operands((4, 8))[0], 1e-4)
    assert [miss.code for miss in reports[0].misses] == ["scalar-operand"]


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


def test_two_readings_choose_the_right_hand_product():
    """In s1 * x + s2 * y both addends match; the right-hand one is taken, always."""
    a, b, g = abg()
    report = captured(lambda a, b, g: S(g) * a + S(b) * b, a, b, g)
    assert [r.nodes for r in report.rewrites] == [["sigmoid_1", "mul_1", "add"]]


def test_chain_of_sums():
    """(a + s * b) + s2 * b2: the second site adds to the first one's result."""

    def chain(a, b, g):
        return (a + S(g) * b) + S(g + 1) * a

    args = abg()
    report = captured(chain, *args)
    assert len(report.rewrites) == 2
    torch.testing.assert_close(fusionpass.fuse(chain)(*args), chain(*args))


def test_rules_option_limits_the_stages():
    x, w, a, b = operands((4, 6), (1, 6), (4, 8), (4, 8))
    report = captured(lambda: a + S(F.linear(x, w)) * b, rules=["gated_add"])
    assert [r.stages for r in report.rewrites] == [["gated_add"]]
    report = captured(lambda: a + S(F.linear(x, w)) * b, numerics="eager")
    assert set(stops(report.rewrites[0]).values()) == {"numerics-eager"}


def test_every_code_is_documented():
    """`fusionpass rules` lists each code that a refusal anywhere in the package can carry, and no other."""
    package = Path(fusionpass.__file__).parent
    used = {
        code
        for path in package.rglob("*.py")
        for code in re.findall(r"""Refusal\(\s*"([a-z0-9-]+)\"""", path.read_text())
    }
    used |= {"view-between", "cast-between"}  # chosen between in one place
    assert used == {code for rule in catalog() for code in rule.codes}
