"""Every spelling of the formula is rewritten, whatever traces it, in any mix of dtypes and under autocast."""

import operator
import re
from contextlib import nullcontext
from functools import reduce
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from programs import (
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
    "dropout of nothing": lambda a, b, g: a + F.dropout(S(g) * b, 0.0, training=True),
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
