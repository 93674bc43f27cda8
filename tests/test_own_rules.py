"""Rules and stages from outside the package: what they rewrite, what keeps them from it, and what the option `rules` takes.

And of every rule, ours included: the formula that it declares, run as a program, is what it rewrites.
"""

import copy
import importlib.util
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from programs import DEVICE, abg, captured, operands, stops

import fusionpass
from fusionpass.cli.rules import rules_text
from fusionpass.entry.cache_key import digest
from fusionpass.options import Options
from fusionpass.rules import (
    CODES,
    GUARDS,
    RULES,
    Op,
    Operand,
    Refusal,
    Rule,
    Site,
    Stage,
    catalog,
    other_bits,
    readers,
    same_bits,
    torch_name,
)

S = torch.sigmoid


def example():
    path = Path(__file__).resolve().parents[1] / "examples" / "own_rule.py"
    spec = importlib.util.spec_from_file_location("own_rule", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SILU_MUL = example().SILU_MUL
GIVEN = [*RULES, SILU_MUL]

LIBRARY = torch.library.Library("fusionpass_tests", "DEF")
LIBRARY.define("squared_relu(Tensor x) -> Tensor")
LIBRARY.define("halved_gated_add(Tensor a, Tensor gate, Tensor b) -> Tensor")
LIBRARY.impl("squared_relu", lambda x: torch.relu(x) ** 2, "CompositeImplicitAutograd")
LIBRARY.impl("halved_gated_add", lambda a, gate, b: (a + S(gate) * b) / 2, "CompositeImplicitAutograd")


def find_squared_relu(words, power):
    base = power.args[0] if words.operation(power) == "pow" else None
    if isinstance(base, torch.fx.Node) and torch_name(base) in ("relu", "relu_") and words.squares(power, base):
        operand = {"x": Operand(base.args[0], read=base)}
        written = {base: base.args[0]} if torch_name(base) == "relu_" else {}
        yield Site(anchor=power, operands=operand, parts=[base, power], in_place=written), None


SQUARED_RELU = Rule(
    name="squared_relu",
    formula="relu(x) ** 2",
    needs=("a relu that nobody else reads",),
    codes=CODES,
    op=Op(torch.ops.fusionpass_tests.squared_relu.default, trains=True),
    anchors=["pow"],
    find=find_squared_relu,
    guards=GUARDS,
    bits=same_bits,
)


def grow_half(site, words, effects):
    found = readers(site.end)
    if len(found) != 1 or torch_name(found[0]) != "truediv" or found[0].args[1] != 2 or site.op.name != "gated_add":
        return Refusal("not-halved", "{} is not divided by 2", site.end)
    op = Op(torch.ops.fusionpass_tests.halved_gated_add.default)
    return site.grown("half", after=found, results=found, at=found[0], op=op)


HALF = Stage(
    name="half",
    formula="out = out / 2",
    needs=("the sum's only reader halves it",),
    codes={"not-halved": "the sum is not halved"},
    grow=grow_half,
    of=("gated_add",),
)


def swiglu(gate, up):
    return F.silu(gate) * up


def test_an_own_rule_rewrites():
    args = operands((4, 8), (4, 8))
    with torch.no_grad():
        report = captured(swiglu, *args, rules=GIVEN, verify=True)
    (site,) = report.rewrites
    assert (site.rule, site.stages, site.nodes, site.kernels_before) == ("silu_mul", ["silu_mul"], ["silu", "mul"], 2)
    assert site.verified and not report.misses
    with torch.no_grad():
        torch.testing.assert_close(fusionpass.fuse(swiglu, rules=GIVEN)(*args), swiglu(*args), rtol=0, atol=0)


@pytest.mark.parametrize("numerics", ["fp32", "eager"])
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_beside_ours(inner, numerics):
    """Each site is told by its rule's name; Inductor fuses what the opaque op would keep apart."""

    def block(a, b, g, x):
        return (a + S(g) * b) @ swiglu(x @ x, x @ b).T

    args = [*abg(8, 8), *operands((8, 8))]
    rules = [*RULES, SILU_MUL]
    with torch.no_grad():
        report = captured(block, *args, rules=rules, inner=inner, numerics=numerics, profitable_only=False)
        assert sorted(site.rule for site in report.rewrites) == ["gated_add", "silu_mul"]
        fused = fusionpass.fuse(block, rules=rules, inner=inner, numerics=numerics, profitable_only=False)
        torch.testing.assert_close(fused(*args), block(*args))


def test_gradients_go_through_an_op_that_has_a_backward():
    x = operands((4, 8))[0].requires_grad_()
    report = captured(lambda x: torch.relu(x) ** 2, x, rules=[SQUARED_RELU])
    assert [site.rule for site in report.rewrites] == ["squared_relu"]
    (got,) = torch.autograd.grad(fusionpass.fuse(lambda x: torch.relu(x) ** 2, rules=[SQUARED_RELU])(x).sum(), x)
    torch.testing.assert_close(got, 2 * torch.relu(x.detach()))


class Sub(torch.Tensor):
    pass


X, Y = operands((4, 8), (4, 8))
# name -> function, arguments, code of the refusal
REFUSED = {
    "silu read by others": (lambda g, u: (h := F.silu(g), h * u), (X, Y), "multi-use"),
    "a factor that is a number": (lambda g, u: F.silu(g) * 3, (X, Y), "scalar-operand"),
    "gradients": (swiglu, (X.clone().requires_grad_(), Y), "needs-grad"),
    "in place": (lambda g, u: F.silu(g).mul_(u), (X, Y), "in-place"),
    "silu in place": (lambda g, u: F.silu(g.clone(), inplace=True) * u, (X, Y), "in-place"),
    "a subclass": (swiglu, (X.as_subclass(Sub), Y), "subclass"),
}


@pytest.mark.parametrize(("function", "args", "code"), REFUSED.values(), ids=REFUSED)
def test_refused(function, args, code):
    report = captured(function, *args, rules=[SILU_MUL])
    assert [(miss.rule, miss.code) for miss in report.misses] == [("silu_mul", code)]


def test_an_operand_that_is_written_is_refused():
    def function(g, u):
        u = u + 0
        h = F.silu(g)
        g.add_(1)
        return h * u

    report = captured(function, X.clone(), Y, rules=[SILU_MUL])
    assert [miss.code for miss in report.misses] == ["mutation-between"]


def test_bits():
    """A rule whose op rounds otherwise than the nodes leaves them where their bits are asked for."""
    rule = replace(SQUARED_RELU, bits=other_bits)
    report = captured(lambda x: torch.relu(x) ** 2, X, rules=[rule], numerics="eager")
    assert [miss.code for miss in report.misses] == ["numerics-eager"]


def test_in_place_where_nobody_sees_it():
    report = captured(lambda x: torch.relu_(x + 1) ** 2, X, rules=[SQUARED_RELU])
    assert len(report.rewrites) == 1
    report = captured(lambda x: torch.relu_(x) ** 2, X.clone(), rules=[SQUARED_RELU])
    assert [miss.code for miss in report.misses] == ["in-place"]


def test_an_op_of_another_layout_is_refused():
    transposed = lambda x: torch.relu(x.t()) ** 2  # noqa: E731
    assert len(captured(transposed, X, rules=[SQUARED_RELU]).rewrites) == 1
    LIBRARY.define("dense_squared_relu(Tensor x) -> Tensor")
    LIBRARY.impl("dense_squared_relu", lambda x: (torch.relu(x) ** 2).contiguous(), "CompositeImplicitAutograd")
    op = Op(torch.ops.fusionpass_tests.dense_squared_relu.default, trains=True)
    report = captured(transposed, X, rules=[replace(SQUARED_RELU, op=op)])
    assert [miss.code for miss in report.misses] == ["stride"]


def test_the_earlier_rule_wins_and_the_later_says_nothing():
    """A second rule that would read the same sums, in either order."""
    ours = RULES[0]
    twin = replace(ours, name="twin", stages=())
    a, b, gate = abg()
    for rules, name in (([ours, twin], "gated_add"), ([twin, ours], "twin")):
        report = captured(lambda a, b, g: a + S(g) * b, a, b, gate, rules=rules)
        assert ([site.rule for site in report.rewrites], report.misses) == ([name], [])
    # What the earlier one refuses, the later one is asked about, and each speaks for itself.
    report = captured(lambda a, b, g: a + 2 * S(g) * b, a, b, gate, rules=[ours, twin])
    assert [(miss.rule, miss.code) for miss in report.misses] == [("gated_add", "scaled"), ("twin", "scaled")]


def test_an_own_stage_joins_our_rule():
    a, b, gate = abg()
    function = lambda a, b, g: (a + S(g) * b) / 2  # noqa: E731
    with torch.no_grad():
        (site,) = captured(function, a, b, gate, rules=[*RULES, HALF]).rewrites
        assert (site.rule, site.stages) == ("gated_add", ["gated_add", "half"])
        fused = fusionpass.fuse(function, rules=["gated_add", HALF])
        torch.testing.assert_close(fused(a, b, gate), function(a, b, gate))
        (site,) = captured(lambda a, b, g: (a + S(g) * b) / 3, a, b, gate, rules=["gated_add", HALF]).rewrites
    stopped = {stop["stage"]: stop["code"] for stop in site.stopped}
    assert stopped["half"] == "not-halved" and stopped["residual"] == "not-allowed"


def test_without_it_nothing_is_rewritten_and_nothing_is_said():
    assert captured(swiglu, X, Y).why_nothing() == f"0 rewritten in 1 graph: {'; '.join(rule.absent for rule in RULES)}"
    report = captured(lambda x: x + 1, X, rules=[SILU_MUL])
    assert report.why_nothing() == "0 rewritten in 1 graph: nothing computes silu(gate) * up"
    assert "silu_mul" not in rules_text("table")
    assert "silu_mul (rule)" in rules_text("table", GIVEN) and '"silu_mul"' in rules_text("json", GIVEN)


# what the option is given -> the error
WRONG = {
    "a stage without its rule": ([SILU_MUL, HALF], "stage 'half' without what it grows from, 'gated_add'"),
    "two of a name": ([*RULES, replace(SILU_MUL, name="gated_add")], "two of the rules have the same name"),
    "a stage alone": ([HALF], "without 'gated_add'"),
}


@pytest.mark.parametrize(("rules", "text"), WRONG.values(), ids=WRONG)
def test_wrong_rules(rules, text):
    with pytest.raises(ValueError, match=text):
        fusionpass.fuse(swiglu, rules=rules)


def test_an_op_is_an_overload():
    with pytest.raises(TypeError, match=r"takes an overload, such as torch\.ops\.mine"):
        Op(torch.ops.own.silu_mul)


def test_options_with_rules_are_equal_and_travel():
    """Dynamo guards on the options by equality; fused modules pickle and copy them."""
    again = replace(SQUARED_RELU, guards=list(GUARDS))
    one, other = (Options.from_user({"rules": [*RULES, rule]}) for rule in (SQUARED_RELU, again))
    assert one == other and hash(one) == hash(other)
    assert one != Options.from_user({"rules": RULES}) != Options.from_user({"rules": [SQUARED_RELU]})
    assert copy.deepcopy(one) == one and pickle.loads(pickle.dumps(one)) == one
    assert str(one).count("Rule(") == len(RULES) + 1


def test_a_changed_rule_is_compiled_anew(tmp_path):
    """Caches know it by the module of its functions, and by its version for what that does not show."""

    def written(text):
        path = tmp_path / f"rule_{len(list(tmp_path.iterdir()))}.py"
        path.write_text(f"def find(words, node):\n    return {text}\n")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return replace(SQUARED_RELU, find=module.find)

    first, second = written("()"), written("[]")
    keys = [digest(), digest((first,)), digest((second,)), digest((replace(first, version="2"),))]
    assert len(set(keys)) == 4 and digest((first,)) == digest((written("()"),))


T, K, H = 4, 2, 8
ORDER = torch.randperm(T * K, generator=torch.Generator().manual_seed(0)).to(DEVICE)
CORES = {
    "gated_add": {"a": (T, H), "gate": (T, 1), "b": (T, H)},
    "finalize": {"weights": (T, K), "y": (T * K, H), "inverse": ORDER},
    "silu_mul": {"gate": (T, H), "up": (T, H)},
    "squared_relu": {"x": (T, H)},
}
STAGES = {
    "gate_projection": {"x": (T, 6), "weight": (1, 6), "bias": (1,)},
    "finalize": {"weights": (T, K), "y": (T * K, H), "inverse": ORDER},
    "residual": {"residual": (T, H)},
    "shared_add": {"shared": (T, H)},
    "post_norm": {"weight": (H,), "eps": 1e-6, "offset": 1.0, "residual": (T, H)},
    "rms_norm": {"weight": (H,), "eps": 1e-6, "offset": 1.0},
    "half": {},
}
AROUND = {"post_norm": "residual"}  # stage -> the one without which it does not join
FORMULAS = [(rule, stage) for rule in (*RULES, SILU_MUL, SQUARED_RELU) for stage in (None, *rule.stages)]
FORMULAS.append((RULES[0], HALF))


def program(rule, stage, values):
    """The rule's formula, with the stage's where its name is read, or behind it."""
    core = f"out = {rule.formula}"
    lines = [core] if stage is None else [core, stage.formula]
    if stage is not None and stage.name in AROUND:
        lines.append(next(each.formula for each in rule.stages if each.name == AROUND[stage.name]))
    if stage is not None and stage.formula.partition(" = ")[0] in rule_operands(rule):
        lines.reverse()
    results = ["out"] if stage is None else sorted({"out", stage.formula.partition(" = ")[0]} - rule_operands(rule))
    results += ["residual.cos()"] if "residual" in values else []  # the norm in front of a layer reads it too
    text = f"def written({', '.join(values)}):\n    " + "\n    ".join([*lines, f"return {', '.join(results)}"])
    names = {**vars(torch), **vars(F)}
    exec(text, names)
    return names["written"]


def rule_operands(rule):
    return set(CORES[rule.name])


@pytest.mark.parametrize(("rule", "stage"), FORMULAS, ids=lambda each: getattr(each, "name", ""))
def test_the_declared_formula_is_what_is_rewritten(rule, stage):
    shapes = dict(CORES[rule.name])
    if stage is not None:
        shapes.pop(stage.formula.partition(" = ")[0], None)
        shapes |= STAGES[stage.name]
    drawn = iter(operands(*(shape for shape in shapes.values() if isinstance(shape, tuple))))
    values = {name: next(drawn) if isinstance(shape, tuple) else shape for name, shape in shapes.items()}
    rules = [*RULES, SILU_MUL, SQUARED_RELU, *([stage] if stage is HALF else [])]
    written = program(rule, stage, values)
    with torch.no_grad():
        report = captured(written, *values.values(), rules=rules, verify=True)
        (site,) = report.rewrites
        assert site.rule == rule.name and site.verified
        named = [] if stage is None else [stage.name, AROUND.get(stage.name, stage.name)]
        assert set(site.stages) == {rule.name, *named}
        torch.testing.assert_close(fusionpass.fuse(written, rules=rules)(*values.values()), written(*values.values()))


def test_every_rule_and_stage_has_its_program():
    assert {each.name for each in catalog()} <= {each.name for pair in FORMULAS for each in pair if each is not None}


def test_stages_are_told_apart_by_what_stops_them():
    (site,) = captured(lambda a, b, g: a + S(g) * b, *abg(), rules=[*RULES, SILU_MUL]).rewrites
    assert set(stops(site)) == {stage.name for stage in RULES[0].stages}
