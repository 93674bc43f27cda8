"""`moe_combine` under tracers, its gradients and transforms, of which it has none of its own, and what it keeps for them."""

import combine_helpers
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from combine_helpers import (
    BF16,
    DIFFERENTIABLE,
    F16,
    F32,
    F64,
    TENSORS,
    dtypes,
    eager,
    expression,
    gradients,
    laid_out,
    normal,
    op,
    operands,
    requiring_grad,
    routed_ways,
    shaped_operands,
)
from ops_helpers import DEVICE, LAYOUTS, assert_no_worse, largest
from torch.library import opcheck

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")  # NumPy, of inf and nan
implementation = combine_helpers.implementation

OPCHECKED = [
    (BF16, "a", "gate", False, "no norm"), (F32, "a", "x", True, "no weight"), (F16, "top-k", "gate", True, "weight"),
    (F32, "indexed", "x, bias", False, "weight, offset 1"), (BF16, "masked", "x, bias", True, "weight, offset 1"),
]  # fmt: skip


@pytest.mark.parametrize("recorded", [False, True], ids=["", "requires grad"])
@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_opcheck(implementation, recorded, case):
    arguments = operands(*case, rows=4, columns=8, k=6)
    arguments = requiring_grad(arguments) if recorded else arguments
    opcheck(op, (arguments.pop("a"), arguments.pop("b")), arguments)


@pytest.mark.parametrize("layout", ["transposed", "padded rows", "one row, expanded"])
@pytest.mark.parametrize("name", ["a", "b", "x", "residual"])
def test_opcheck_layouts(name, layout):
    arguments = laid_out(shaped_operands(F32), name, LAYOUTS[layout])
    opcheck(op, (arguments.pop("a"), arguments.pop("b")), arguments)


@pytest.mark.parametrize("routed", ["a", "masked"])
def test_compiled_once_for_several_sizes(implementation, routed):
    compiles = []

    def counting(graph, inputs):
        compiles.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def function(tensors):
        if routed == "a":
            return op(**tensors, eps=0.125)
        return op(**tensors, top_k=3, permuted=True, eps=0.125, offset=1.0)

    compiled = torch.compile(function, backend=counting, fullgraph=True, dynamic=True)
    for rows in range(2, 10):
        tensors = dict(list(operands(F32, routed, rows=rows, seed=rows).items())[: len(TENSORS)])
        torch.testing.assert_close(compiled(tensors), function(tensors))
    assert len(compiles) == 1


@dtypes
@routed_ways
@pytest.mark.parametrize("gate", ["gate", "x, bias"])
@pytest.mark.parametrize("norm", ["no norm", "weight, offset 1"])
def test_gradients_are_no_less_exact_than_the_nodes(implementation, dtype, routed, gate, norm):
    """And rounded once where nothing is rounded between: in fp32, or with neither a projection nor a norm.

    Elsewhere the steps hand on a logit and a sum in 16 bits, as the nodes do, so that no more is saved.
    """
    arguments = requiring_grad(operands(dtype, routed, gate, True, norm, weights=F32))
    doubles = {k: v.double() if getattr(v, "requires_grad", False) else v for k, v in arguments.items()}
    truths = gradients(lambda **n: expression(F64, **n), requiring_grad(doubles))
    got, theirs = gradients(op, arguments), gradients(eager, arguments)
    assert len(got) == len(truths) >= 4
    for name, truth in truths.items():
        assert got[name].shape == truth.shape and got[name].dtype == arguments[name].dtype
        if dtype == F32 or (gate == "gate" and norm == "no norm"):
            # Half a unit for the one rounding, and fp32 sums of up to 240 terms.
            near = dict(rtol=0.51 * torch.finfo(got[name].dtype).eps, atol=1e-6 * max(largest(truth), 10.0))
            torch.testing.assert_close(got[name].double(), truth, **near)
        else:
            # One unit in the last place of the largest element, of the dtype that both round to on the way.
            assert_no_worse(got[name], theirs[name], truth, torch.finfo(dtype).eps * largest(truth))


@pytest.mark.parametrize("wanted", DIFFERENTIABLE)
def test_gradient_of_one_input(implementation, wanted):
    arguments = operands(gate="gate" if wanted == "gate" else "x, bias")
    arguments[wanted].requires_grad_()
    (got,) = gradients(op, arguments).values()
    torch.testing.assert_close(got, gradients(eager, arguments)[wanted], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not any(y.requires_grad for y in op(**arguments))


@pytest.mark.parametrize("wanted", DIFFERENTIABLE)
def test_forward_mode(implementation, wanted):
    """A tangent that is silently zero would be the failure."""
    arguments = operands(gate="gate" if wanted == "gate" else "x, bias")
    tangent = normal(seed=9)(arguments[wanted].shape)
    with forward_ad.dual_level():
        dual = arguments | {wanted: forward_ad.make_dual(arguments[wanted], tangent)}
        for mine, theirs in zip(op(**dual), eager(**dual), strict=True):
            mine, theirs = forward_ad.unpack_dual(mine).tangent, forward_ad.unpack_dual(theirs).tangent
            assert theirs is not None or wanted == "norm_weight"
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


TRANSFORMS = {
    "grad": lambda f, *x: torch.func.grad(lambda *x: sum(y.pow(2).sum() for y in f(*x)), argnums=(0, 1, 2))(*x),
    "jvp": lambda f, *x: torch.func.jvp(f, x, tuple(t.cos() for t in x)),
    "jacrev": lambda f, *x: torch.func.jacrev(f, argnums=1)(*x),
    "hessian": lambda f, *x: torch.func.hessian(lambda x: f(x, x, x)[1].pow(2).sum())(x[0]),
    "vmap": lambda f, *x: torch.vmap(f)(*[torch.stack([t, 2 * t, t.cos()]) for t in x]),
    "vmap of one": lambda f, *x: torch.vmap(f, (0, None, None))(torch.stack([x[0], x[1]]), *x[1:]),
    "vmap of jvp": lambda f, *x: torch.vmap(lambda t: torch.func.jvp(f, x, (t, t, t)))(torch.stack([x[0], x[1]])),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("routed", ["a", "permuted", "masked"])
def test_transforms(implementation, routed, transform):
    arguments = operands(F32, routed, rows=3, columns=8, k=8, top_k=1)
    tensors = [normal(seed=i)((3, 8)) for i in (3, 4, 5)]
    mine, theirs = (
        transform(lambda a, b, x, f=f: f(**arguments | {"a": a, "b": b, "x": x}), *tensors) for f in (op, eager)
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def kept_bytes(function):
    """Of the storages that the backward keeps, each counted once."""
    sizes = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        results = function()
    return sum(sizes.values()), results


NODES = {
    "core": {"top_k": 0, "residual": False, "norm": None},
    "residual": {"top_k": 0, "residual": True, "norm": None},
    "finalize": {"top_k": 2, "residual": True, "norm": None},
    "norm": {"top_k": 0, "residual": True, "norm": 0.0},
    "norm of 1 + weight": {"top_k": 2, "residual": False, "norm": 1.0},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, F32], ids=str)
@pytest.mark.parametrize("projects", [True, False])
@pytest.mark.parametrize(("top_k", "residual", "norm"), [tuple(n.values()) for n in NODES.values()], ids=NODES)
def test_no_more_is_saved_than_by_the_nodes(implementation, dtype, projects, top_k, residual, norm):
    def make(*shape):
        return torch.randn(shape, device=DEVICE, dtype=dtype).requires_grad_()

    t, h = 64, 128
    a, b, r, w = make(t * max(top_k, 1), h), make(t, h), make(t, h), make(h)
    x, gate_weight, gate, topk = make(t, h), make(1, h), make(t, 1), make(t, 2)

    def nodes():
        routed = (a * topk.view(-1, 1)).view(t, 2, h).sum(1) if top_k else a
        total = routed + torch.sigmoid(torch.nn.functional.linear(x, gate_weight) if projects else gate) * b
        total = r + total if residual else total
        if norm is None:
            return total, None
        wide = total.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return total, (normed * (1.0 + w.float())).to(dtype) if norm else w * normed.to(dtype)

    options = {"x": x, "gate_weight": gate_weight} if projects else {"gate": gate}
    options |= {"topk_weights": topk, "top_k": 2} if top_k else {}
    options |= {"residual": r} if residual else {}
    options |= {} if norm is None else {"norm_weight": w, "eps": 1e-6, "offset": norm}
    least, _ = kept_bytes(nodes)
    ours, results = kept_bytes(lambda: torch.ops.fusionpass.moe_combine(a, b, **options))
    assert ours <= least
    assert all(result.requires_grad for result in results if result.numel())
