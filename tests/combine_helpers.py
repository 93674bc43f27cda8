"""Operands of `moe_combine`, the truth, eager's way and the tolerances, for the files that test it."""

import sys
from math import prod

import pytest
import torch
from ops_helpers import DEVICE, DTYPES, ROUNDING, assert_no_worse, fill_fresh_memory_with_nan, largest, record_launches

from fusionpass.kernels import launching, moe_combine
from fusionpass.kernels.launching import Calls
from fusionpass.kernels.moe_combine_aten import Arguments, moe_combine_expression
from fusionpass.operators import implementations

op = torch.ops.fusionpass.moe_combine.default
BF16, F16, F32, F64, I32, I64 = torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32, torch.int64

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

ROUTED = {  # how `a` comes about -> whether it is a weighted sum, indexed, with weights in the order of y's rows, masked
    "a": (False, False, False, False), "top-k": (True, False, False, False), "indexed": (True, True, False, False),
    "permuted": (True, True, True, False), "masked top-k": (True, False, False, True), "masked": (True, True, True, True),
}  # fmt: skip
GATES = {"gate": (False, False), "x": (True, False), "x, bias": (True, True)}  # whether projected, with a bias
NORMS = {  # eps, whether there is a weight, offset; an eps that shows in bf16
    "no norm": (None, False, 0.0), "no weight": (0.125, False, 0.0), "weight": (0.125, True, 0.0),
    "weight, offset 1": (0.125, True, 1.0),
}  # fmt: skip
routed_ways = pytest.mark.parametrize("routed", ROUTED)
gates = pytest.mark.parametrize("gate", GATES)
norms = pytest.mark.parametrize("norm", NORMS)
halves = pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])


@pytest.fixture(params=["kernel", "aten"])
def implementation(request, monkeypatch):
    """On a CPU: the Triton kernel under the interpreter, or the ATen implementation. On CUDA there is one."""
    if DEVICE == "cuda" and request.param == "aten":
        for module in (sys.modules[__name__], request.module):
            monkeypatch.setattr(module, "DEVICE", "cpu", raising=False)
    monkeypatch.setattr(implementations, "interpreted", lambda: request.param == "kernel")


@pytest.fixture
def forgotten(monkeypatch):
    """What the kernel module prepared before is out of sight."""
    monkeypatch.setattr(moe_combine, "_known", Calls())


@pytest.fixture
def nan_filled(monkeypatch, forgotten):
    """Fresh memory is all NaN, so that an element nobody wrote cannot pass; the allocator past `torch` is not used."""
    monkeypatch.setattr(launching, "_empty_strided_cuda", None)
    fill_fresh_memory_with_nan(monkeypatch)


@pytest.fixture
def recorded(monkeypatch, forgotten):
    return record_launches(monkeypatch, moe_combine)


def normal(dtype=F32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator).to(DEVICE, dtype)


def indices(slots, seed=0, dtype=I64):
    """A permutation of the rows of y, half of them counted from the end."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (slots,), generator=generator)
    return (torch.randperm(slots, generator=generator) - slots * signs).to(DEVICE, dtype)


def operands(
    dtype=F32, routed="masked", gate="x, bias", residual=True, norm="weight, offset 1", *, rows=5, columns=48, k=40,
    top_k=3, seed=0, weights=None, index=I64,
):  # fmt: skip
    """Every argument of a call by name; `weights` is the dtype of the top-k and norm weights where it is another."""
    make, make_weights = normal(dtype, seed), normal(weights or dtype, seed + 1)
    summed, indexed, permuted, masked = ROUTED[routed]
    projected, bias = GATES[gate]
    eps, weighted, offset = NORMS[norm]
    return {
        "a": make((rows * top_k if summed else rows, columns)),
        "b": make((rows, columns)),
        "gate": None if projected else make((rows, 1)),
        "x": make((rows, k)) if projected else None,
        "gate_weight": make((1, k)) / k**0.5 if projected else None,
        "gate_bias": make((1,)) if bias else None,
        "topk_weights": make_weights((rows, top_k)) if summed else None,
        "inverse": indices(rows * top_k, seed, index) if indexed else None,
        "masked": indices(rows * top_k, seed + 1) % 3 == 0 if masked else None,
        "residual": make((rows, columns)) if residual else None,
        "norm_weight": make_weights((columns,)) if weighted else None,
        "top_k": top_k if summed else 0,
        "permuted": permuted,
        "eps": eps,
        "offset": offset,
    }


TENSORS = list(operands())[:11]
DIFFERENTIABLE = [name for name in TENSORS if name not in ("inverse", "masked")]
PRODUCTS = "a b x gate_weight topk_weights residual".split()  # what is summed up


def expression(dtype=F32, **arguments):
    return moe_combine_expression(Arguments(**arguments), compute=dtype)


def eager(
    a, b, gate, x, gate_weight, gate_bias, topk_weights, inverse, masked, residual, norm_weight, top_k, permuted, eps,
    offset,
):  # fmt: skip
    """As a model writes it: rounded after each op, the norm in float32."""
    h = b.shape[-1]
    routed, b = a.reshape(-1, h), b.reshape(-1, h)
    if top_k:
        weights = topk_weights.reshape(-1, 1)
        routed = routed if masked is None else routed.masked_fill(masked.reshape(-1, 1), 0)
        routed = routed * weights if permuted else routed
        routed = routed if inverse is None else routed[inverse.reshape(-1)]
        routed = routed if permuted else routed * weights
        routed = routed.view(-1, top_k, h).sum(1).to(b.dtype)
    if x is not None:
        bias = None if gate_bias is None else gate_bias.reshape(1)
        gate = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), gate_weight.reshape(1, -1), bias)
    total = routed + torch.sigmoid(gate.reshape(-1, 1)) * b
    if residual is not None:
        total = residual + total.reshape(residual.shape)
    if eps is None:
        return total, total.new_empty(0)
    wide = total.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if norm_weight is None:
        return total, wide.to(b.dtype)
    if offset:
        return total, (wide * (offset + norm_weight.float())).to(b.dtype)
    return total, (norm_weight * wide.to(b.dtype)).to(b.dtype)


def slacks(arguments):
    """What fp32 may add to the errors of the two results: twice a bound of their own errors.

    The sum: a rounding per term and addition and three of the sigmoid, of the terms' absolute sum, and 16 of K products
    (in blocks, then in a tree) through the sigmoid's largest slope, 1/4. The norm: that error through both of its
    factors, and 24 roundings, of which 14 are a tree over H.
    """
    n = {name: t.abs() if name in PRODUCTS and t is not None else t for name, t in arguments.items()}
    gate = n["b"].new_full((prod(n["b"].shape[:-1]),), float("inf"))
    terms = largest(expression(F64, **n | {"gate": gate, "x": None, "norm_weight": None, "eps": None})[0])
    error = (n["top_k"] + 8) * ROUNDING * terms
    if n["x"] is not None and n["x"].numel():
        products = (n["x"].double() @ n["gate_weight"].double().reshape(-1)).max().item()
        error += 16 * ROUNDING * products / 4 * largest(n["b"])
    if n["eps"] is None or not n["b"].numel():
        return 2 * error, 0.0
    total = expression(F64, **arguments)[0]
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + n["eps"])
    normed = largest(total * scale)
    weight = 1.0 if n["norm_weight"] is None else largest(n["norm_weight"].double() + n["offset"])
    return 2 * error, 2 * weight * (error * largest(scale) * (1 + normed) + 24 * ROUNDING * normed)


def check(arguments, call=op):
    """Both results against the truth and eager, and what memory they lie in."""
    results = call(**arguments)
    shaped = arguments["b"] if arguments["residual"] is None else arguments["residual"]
    shapes = [shaped.shape, (0,) if arguments["eps"] is None else shaped.shape]
    storages = {t.untyped_storage().data_ptr() for t in arguments.values() if isinstance(t, torch.Tensor)}
    truths, eagers = expression(F64, **arguments), eager(**arguments)
    for y, shape, truth, theirs, slack in zip(results, shapes, truths, eagers, slacks(arguments), strict=True):
        assert (y.shape, y.dtype, y.device) == (shape, shaped.dtype, shaped.device)
        assert y.is_contiguous() and y.storage_offset() == 0
        if y.numel():
            memory = y.untyped_storage()
            assert memory.nbytes() == y.numel() * y.element_size() and memory.data_ptr() not in storages
            storages.add(memory.data_ptr())
        assert_no_worse(y, theirs.reshape(shape), truth, slack)
    return results


def assert_same(got, expected):
    """The same bits; on CUDA, where sums over a row follow the layout, to one rounding."""
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        if DEVICE == "cpu":
            assert torch.equal(mine, theirs)
        else:
            torch.testing.assert_close(mine, theirs, rtol=torch.finfo(mine.dtype).eps, atol=1e-5)


def laid_out(arguments, name, lay):
    """The arguments with one operand made anew in another layout."""
    old, make = arguments[name], normal(arguments[name].dtype, 7)
    if not old.is_floating_point():  # any index is in range, any number a mask
        make = lambda shape: (torch.arange(prod(shape)) * 7 % 36 - 18).view(shape).to(DEVICE, old.dtype)  # noqa: E731
    return arguments | {name: lay(make, tuple(old.shape))}


def shaped_operands(dtype=BF16, gate="x, bias", **others):
    """Operands with all the dims they may have."""
    n = operands(dtype, gate=gate, rows=6, columns=40, k=24, **others)
    a, inverse, residual = n["a"].view(6, 3, 40), n["inverse"].view(6, 3), n["residual"].view(2, 3, 40)
    return n | {"a": a, "inverse": inverse, "masked": n["masked"].view(6, 3), "residual": residual}


def requiring_grad(arguments):
    return {k: v.detach().requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in arguments.items()}  # fmt: skip


def gradients(function, arguments, seed=3):
    """Of every floating-point operand, by name."""
    leaves = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.requires_grad}
    results = [y for y in function(**arguments) if y.requires_grad and y.numel()]
    dys = [normal(BF16, seed)(y.shape).to(y) for y in results]  # numbers that no dtype here rounds
    return dict(zip(leaves, torch.autograd.grad(results, list(leaves.values()), dys), strict=True))
