"""Memory that is written between the sum and the backward: gradients and errors as without the ops."""

from __future__ import annotations

import pytest
import torch
from programs import DEVICE, operands

import fusionpass
from fusionpass.operators import implementations

gated_add = torch.ops.fusionpass.gated_add
projected = torch.ops.fusionpass.gate_projected_add

WRITES = {
    "in place": lambda t: t.add_(1),
    "foreach": lambda t: torch._foreach_add_([t], 1.0),
    ".data": lambda t: t.data.add_(1),
    "no_grad": lambda t: torch.no_grad()(t.mul_)(2),
    "copy_": lambda t: t.copy_(torch.zeros_like(t)),
    "a view": lambda t: t[:1].zero_(),
}
writes = pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)


@pytest.fixture(params=["kernel", "aten"] if DEVICE == "cpu" else ["kernel"], autouse=True)
def implementation(request, monkeypatch):
    monkeypatch.setattr(implementations, "interpreted", lambda: request.param == "kernel")


def gradients_of(run, shapes=((4, 8), (4, 1), (4, 8)), dtype=torch.float32):
    given = [t.requires_grad_() for t in operands(*shapes, dtype=dtype)]
    run(*given).sum().backward()
    return [t.grad for t in given]


def written(combine, write):
    """a + sigmoid(g) * b, and then g written."""

    def run(a, g, b):
        g = g * 1
        y = combine(a, g, b)
        write(g)
        return y + g

    return run


def nodes(a, g, b):
    return a + torch.sigmoid(g) * b


def assert_same(got, want, dtype=torch.float32):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


@writes
@pytest.mark.parametrize("gate", [(4, 1), (4, 8), (8,)], ids=str)
@pytest.mark.parametrize("numerics", ["fp32", "eager"])
def test_the_gate_is_written(write, gate, numerics):
    shapes = (4, 8), gate, (4, 8)

    def combine(a, g, b):
        return gated_add(a, g, b, numerics=numerics)

    assert_same(gradients_of(written(combine, write), shapes), gradients_of(written(nodes, write), shapes))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("write", ["in place", "foreach", ".data"])
def test_the_gate_is_written_in_a_compiled_program(write, inner):
    run = written(nodes, WRITES[write])
    assert_same(gradients_of(fusionpass.fuse(run, inner=inner, profitable_only=False)), gradients_of(run))


@pytest.mark.parametrize("name", ["a", "gate", "b", "x", "weight"])
@pytest.mark.parametrize("kind", ["gated", "projected"])
def test_errors_are_where_the_nodes_have_them(kind, name):
    """Of what the nodes save, a write is an error in the backward; of what they do not, it is none."""

    def outcome(combine):
        given = operands((4, 8), (4, 1), (4, 8), (4, 6), (1, 6))
        a, g, b, x, w = (t.requires_grad_() * 1 for t in given)
        y = combine(a, g, b, x, w)
        {"a": a, "gate": g, "b": b, "x": x, "weight": w}[name].add_(1)
        try:
            y.sum().backward()
        except RuntimeError as error:
            return "modified by an inplace operation" in str(error)
        return [t.grad.sum().item() for t in given if t.grad is not None]

    def plain(a, g, b, x, w):
        return nodes(a, g if kind == "gated" else torch.nn.functional.linear(x, w), b)

    def fused(a, g, b, x, w):
        return gated_add(a, g, b) if kind == "gated" else projected(x, w, None, a, b)

    got, want = outcome(fused), outcome(plain)
    assert got == (want if want is True else pytest.approx(want, rel=1e-5, abs=1e-5))


@writes
def test_second_derivatives_after_a_write(write):
    def second(combine):
        given = [t.requires_grad_() for t in operands((4, 8), (4, 1), (4, 8))]
        a, g, b = (t * 1 for t in given)
        y = combine(a, g, b)
        write(g)
        first = torch.autograd.grad(y.square().sum(), given, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), given)

    for got, want in zip(second(gated_add), second(nodes), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@writes
def test_a_checkpoint_and_hooks_see_the_same(write):
    from torch.utils.checkpoint import checkpoint

    def checkpointed(combine):
        run = written(combine, write)
        return gradients_of(lambda *given: checkpoint(run, *given, use_reentrant=False))

    assert_same(checkpointed(gated_add), checkpointed(nodes))


def test_functional_gradients_after_a_write():
    run = written(gated_add, WRITES["in place"])
    given = operands((4, 8), (4, 1), (4, 8))
    functional = torch.func.grad(lambda *given: run(*given).sum(), argnums=(0, 1, 2))(*given)
    assert_same(functional, gradients_of(written(nodes, WRITES["in place"])))


def test_the_sum_of_moe_combine_is_written():
    """Eager's norm casts the sum to float32, which is a copy in 16 bits: a later write to the sum is none of its concern."""
    options = {"eps": 1e-6}

    def run(a, g, b, weight):
        total, normed = torch.ops.fusionpass.moe_combine(a, b, gate=g, norm_weight=weight, **options)
        total = total + 0 if total.dtype == torch.float32 else total
        total.add_(1)
        return normed

    def plain(a, g, b, weight):
        wide = (a.float() + torch.sigmoid(g.float()) * b.float()).to(a.dtype).float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + options["eps"])
        return (weight.float() * normed).to(a.dtype)

    for dtype in (torch.float32, torch.bfloat16):
        shapes = (4, 8), (4, 1), (4, 8), (8,)
        for got, want in zip(gradients_of(run, shapes, dtype), gradients_of(plain, shapes, dtype), strict=True):
            assert got.dtype == dtype
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(got, want, rtol=8 * eps, atol=16 * eps)
