"""`moe_combine` without a gate: with a shared expert or none, factors, and the norm in front of the residual."""

import combine_helpers
import pytest
import torch
from combine_helpers import BF16, F32, F64, dtypes, expression, forgotten, indices, nan_filled, normal, op
from ops_helpers import DEVICE, ROUNDING, assert_no_worse, largest

implementation = combine_helpers.implementation
forgotten, nan_filled = forgotten, nan_filled

FORMS = {  # what is there besides the weighted sum
    "routed alone": {},
    "shared": {"b": True},
    "shared, residual": {"b": True, "residual": True},
    "residual, norm": {"residual": True, "norm": True},
    "all": {"b": True, "residual": True, "norm": True, "post": True, "routed_scale": 2.5, "scale": 0.25},
    "factor of the routed sum": {"b": True, "routed_scale": 2.5},
    "factor of both": {"b": True, "residual": True, "scale": -0.5},
    "post-norm": {"b": True, "post": True, "residual": True},
    "post-norm without a weight": {"post": "bare", "residual": True, "norm": True},
}


def operands(dtype=F32, *, rows=5, columns=48, top_k=3, b=False, residual=False, norm=False, post=False, **numbers):
    make = normal(dtype)
    given = {
        "a": make((rows * top_k, columns)),
        "b": make((rows, columns)) if b else None,
        "topk_weights": make((rows, top_k)),
        "inverse": indices(rows * top_k),
        "residual": make((rows, columns)) if residual else None,
        "norm_weight": make((columns,)) if norm else None,
        "post_norm_weight": make((columns,)) if post is True else None,
        "top_k": top_k,
        "eps": 0.125 if norm else None,
    }
    return given | ({"post_eps": 0.25} if post else {}) | numbers


def rms_norm(x, weight, eps):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) if weight is None else weight * wide.to(x.dtype)


def eager(a, b, topk_weights, inverse, residual, norm_weight, post_norm_weight, top_k, eps, **n):
    """As a model writes it: rounded after each op, the norms in float32."""
    total = (a[inverse].view(-1, top_k, a.shape[-1]) * topk_weights[..., None]).sum(1) * n.get("routed_scale", 1)
    total = (total if b is None else total + b) * n.get("scale", 1)
    if "post_eps" in n:
        total = rms_norm(total, post_norm_weight, n["post_eps"])
    total = total if residual is None else residual + total
    return total, total.new_empty(0) if eps is None else rms_norm(total, norm_weight, eps)


@dtypes
@pytest.mark.parametrize("form", FORMS)
def test_forms(implementation, nan_filled, dtype, form):
    given = operands(dtype, **FORMS[form])
    results, truths, eagers = op(**given), expression(F64, **given), eager(**given)
    for got, truth, theirs in zip(results, truths, eagers, strict=True):
        assert (got.shape, got.dtype, got.stride()) == (theirs.shape, dtype, theirs.stride())
        if got.numel():
            assert_no_worse(got, theirs, truth, 64 * ROUNDING * largest(truth))


def test_the_truth_is_the_formula():
    """Against loops over rows and terms."""
    n = {k: v.double() if getattr(v, "is_floating_point", bool)() else v for k, v in operands(**FORMS["all"]).items()}
    total, normed = expression(F64, **n)
    for t in range(5):
        row = sum(n["topk_weights"][t, k] * n["a"][n["inverse"][3 * t + k]] for k in range(3))
        row = 0.25 * (2.5 * row + n["b"][t])
        row = n["residual"][t] + row / (row.square().mean() + 0.25).sqrt() * n["post_norm_weight"]
        torch.testing.assert_close(total[t], row)
        torch.testing.assert_close(normed[t], row / (row.square().mean() + 0.125).sqrt() * n["norm_weight"])


@pytest.mark.parametrize(
    ("shape", "form"), [((2, 3, 40), "shared"), ((6, 40), "shared"), ((2, 3, 40), "residual, norm")]
)
def test_the_result_has_the_shape_of_what_is_added(implementation, shape, form):
    given = operands(rows=6, columns=40, **FORMS[form])
    name = "b" if form == "shared" else "residual"
    flat = op(**given)
    shaped = op(**given | {name: given[name].view(shape)})
    assert shaped[0].shape == shape
    for x, y in zip(flat, shaped, strict=True):
        assert torch.equal(x.view(-1), y.view(-1))


REFUSED = {
    "a gate without what it gates": ({"gate": (4, 1)}, "a gate is given without b"),
    "both gates": (
        {"b": (4, 8), "gate": (4, 1), "x": (4, 6), "gate_weight": (1, 6)},
        "either gate, or x and gate_weight",
    ),
    "rows that top_k does not divide": ({"a": (7, 8)}, "a is .7, 8., allowed: a number of rows that top_k, 2, divides"),
    "a weight without its eps": ({"post_norm_weight": (8,)}, "post_norm_weight is given without post_eps"),
    "a residual of other columns": ({"residual": (4, 7)}, "allowed: 7 columns as residual|elements for residual"),
}


@pytest.mark.parametrize("way", ["run", "meta"])
@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(way, change, message):
    shapes = {"a": (8, 8), "topk_weights": (4, 2)} | change
    device = DEVICE if way == "run" else "meta"
    given = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
    with pytest.raises(RuntimeError, match=message):
        op(**given, top_k=2)


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form):
    torch.library.opcheck(op, (), operands(**FORMS[form]))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_expression(implementation, form):
    """It has no backward of its own: its steps are taken."""
    given = operands(**FORMS[form])
    leaves = [v.requires_grad_() for v in given.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    sides = []
    for function in (op, eager):
        results = [y for y in function(**given) if y.numel()]
        sides.append(torch.autograd.grad([y.square().sum() for y in results], leaves))
    torch.testing.assert_close(*sides)


def test_rows_of_any_number_share_a_kernel(implementation):
    for rows in (1, 2, 7, 64):
        given = operands(BF16, rows=rows, **FORMS["all"])
        for got, want in zip(op(**given), expression(F32, **given), strict=True):
            torch.testing.assert_close(got.float(), want.float(), rtol=0.02, atol=0.02)
