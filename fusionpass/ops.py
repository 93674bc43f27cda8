"""The registered ops, `torch.ops.fusionpass.*`, and `gated_add`, the function for people.

    fusionpass::gated_add            y = a + sigmoid(gate) * b
    fusionpass::gate_projected_add   y = a + sigmoid(x . weight + bias) * b
    fusionpass::_gated_add_out       the first, written into a given tensor; behind `gated_add(..., out=)`

The first two are functional: a fresh result, no aliasing, no mutation. Its shape, dtype and strides are those of the
eager expression `a + torch.sigmoid(gate) * b`, whatever the layout of the operands.

They are registered by `Library.define` and `impl`, not `custom_op`: on an H100 host (bf16, 32 x 2048) a call through
the former took 19.5 us of CPU time and through the latter 36.8. Triton is imported when the first CUDA tensor arrives.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusionpass.kernels import aten, contract, overlap

__all__ = ["gated_add"]

_PLAIN = (Tensor, torch.nn.Parameter)

_library = torch.library.Library("fusionpass", "FRAGMENT")
for _schema in (
    'gated_add(Tensor a, Tensor gate, Tensor b, *, str numerics="fp32") -> Tensor',
    "_gated_add_out(Tensor a, Tensor gate, Tensor b, Tensor(a!) out) -> ()",
    "gate_projected_add(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))  # held by opcheck in the tests
_gated_add_op = torch.ops.fusionpass.gated_add.default
_gated_add_out_op = torch.ops.fusionpass._gated_add_out.default
_gate_projected_add_op = torch.ops.fusionpass.gate_projected_add.default


# Checks of the registered ops: RuntimeError, as ATen's own ops raise.


def _check_gated_add(a: Tensor, gate: Tensor, b: Tensor, numerics: str) -> None:
    problem = contract.gated_add_problem(a, gate, b, numerics)
    if problem is not None:
        raise RuntimeError(f"fusionpass::gated_add: {problem}")


def _check_gate_projected_add(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> None:
    problem = contract.gate_projected_add_problem(x, weight, bias, a, b)
    if problem is not None:
        raise RuntimeError(f"fusionpass::gate_projected_add: {problem}")


# Forward: ATen on a CPU, Triton where a CUDA tensor arrives, or on CPU tensors under Triton's interpreter.


@functools.cache
def _kernel_modules():
    from fusionpass.kernels import gate_projected_add, gated_add

    return gated_add, gate_projected_add


@functools.cache
def _interpreted() -> bool:
    """Whether CPU tensors take the Triton kernels; like Triton itself, decided once."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _gated_add_cuda(a: Tensor, gate: Tensor, b: Tensor, *, numerics: str = "fp32") -> Tensor:
    if not contract.usual_gated_add(a, gate, b) or numerics not in contract.NUMERICS:
        _check_gated_add(a, gate, b, numerics)
    y = aten.empty_sum(a, gate, b)
    _kernel_modules()[0].launch(y, a, gate, b, numerics)
    return y


def _gated_add_cpu(a: Tensor, gate: Tensor, b: Tensor, *, numerics: str = "fp32") -> Tensor:
    if _interpreted():
        return _gated_add_cuda(a, gate, b, numerics=numerics)
    if not contract.usual_gated_add(a, gate, b) or numerics not in contract.NUMERICS:
        _check_gated_add(a, gate, b, numerics)
    return aten.gated_add(a, gate, b, numerics)


def _gated_add_fake(a: Tensor, gate: Tensor, b: Tensor, *, numerics: str = "fp32") -> Tensor:
    _check_gated_add(a, gate, b, numerics)
    return a + torch.sigmoid(gate) * b


def _gate_projected_add_cuda(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    if not contract.usual_gate_projected_add(x, weight, bias, a, b):
        _check_gate_projected_add(x, weight, bias, a, b)
    y = aten.empty_row_gated_sum(a, b)
    _kernel_modules()[1].launch(y, x, weight, bias, a, b)
    return y


def _gate_projected_add_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    if _interpreted():
        return _gate_projected_add_cuda(x, weight, bias, a, b)
    if not contract.usual_gate_projected_add(x, weight, bias, a, b):
        _check_gate_projected_add(x, weight, bias, a, b)
    return aten.gate_projected_add(x, weight, bias, a, b)


def _gate_projected_add_fake(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    _check_gate_projected_add(x, weight, bias, a, b)
    return a + torch.sigmoid(a.new_empty((*a.shape[:-1], 1))) * b


def _gated_add_out_cuda(a: Tensor, gate: Tensor, b: Tensor, out: Tensor) -> None:
    _kernel_modules()[0].launch(out, a, gate, b, "fp32")
    _written(out)


def _gated_add_out_cpu(a: Tensor, gate: Tensor, b: Tensor, out: Tensor) -> None:
    if _interpreted():
        return _gated_add_out_cuda(a, gate, b, out)
    aten.gated_add_into(out, a, gate, b)
    _written(out)


def _written(out: Tensor) -> None:
    """Tell autograd that `out` has new contents, so that a graph that saved the old ones refuses to use them."""
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)


# Autograd. `torch.library.register_autograd` would do but for one thing: it has no forward-mode rule, and then gives a
# tangent of zero without a word. So the Autograd kernels are written out, and where a functorch transform or a dual
# level is active they compute the expression in differentiable ATen ops instead.


def _transforms_active() -> bool:
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _plain_keys() -> dict[int, str]:
    """The key sets, below Autograd, of ordinary CPU and CUDA tensors with no mode or transform at work."""
    keys = {}
    for device in ("CPU", "CUDA"):
        dense = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device))
        for plain in (dense, dense.add(torch._C.DispatchKey.ADInplaceOrView)):
            keys[plain.raw_repr()] = device
    return keys


_PLAIN_KEYS = _plain_keys()
_AFTER_AUTOGRAD = torch._C._after_autograd_keyset


def _below_autograd(op, keyset, *args, **kwargs) -> Tensor:
    """What the dispatcher would run next; for plain keys the implementation itself, which spares 15 us of the host."""
    below = keyset & _AFTER_AUTOGRAD
    device = _PLAIN_KEYS.get(below.raw_repr())
    if device is not None:
        return _IMPLEMENTATIONS[op, device](*args, **kwargs)
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(below, *args, **kwargs)


class _GatedAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keyset, numerics, a, gate, b):
        ctx.numerics = numerics
        _, need_gate, need_b = ctx.needs_input_grad[2:]
        ctx.save_for_backward(gate if need_gate or need_b else None, b if need_gate else None)
        return _below_autograd(_gated_add_op, keyset, a, gate, b, numerics=numerics)

    @staticmethod
    def backward(ctx, dy):
        gate, b = ctx.saved_tensors
        return None, None, *aten.gated_add_gradients(dy, gate, b, ctx.numerics, ctx.needs_input_grad[2:])


class _GateProjectedAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keyset, x, weight, bias, a, b):
        need_x, need_weight, need_bias, _, need_b = ctx.needs_input_grad[1:]
        need_logit = need_x or need_weight or need_bias
        kept = (x, weight, bias) if need_logit or need_b else (None, None, None)
        ctx.save_for_backward(*kept, b if need_logit else None)
        return _below_autograd(_gate_projected_add_op, keyset, x, weight, bias, a, b)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, b = ctx.saved_tensors
        return None, *aten.gate_projected_add_gradients(dy, x, weight, bias, b, ctx.needs_input_grad[1:])


def _gated_add_autograd(keyset, a: Tensor, gate: Tensor, b: Tensor, *, numerics: str = "fp32") -> Tensor:
    if _transforms_active():
        _check_gated_add(a, gate, b, numerics)
        return aten.gated_add_expression(a, gate, b, numerics)
    if torch.is_grad_enabled() and (a.requires_grad or gate.requires_grad or b.requires_grad):
        return _GatedAdd.apply(keyset, numerics, a, gate, b)
    return _below_autograd(_gated_add_op, keyset, a, gate, b, numerics=numerics)


def _gate_projected_add_autograd(
    keyset, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor
) -> Tensor:
    if _transforms_active():
        _check_gate_projected_add(x, weight, bias, a, b)
        return aten.gate_projected_add_expression(x, weight, bias, a, b)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, a, b)):
        return _GateProjectedAdd.apply(keyset, x, weight, bias, a, b)
    return _below_autograd(_gate_projected_add_op, keyset, x, weight, bias, a, b)


_IMPLEMENTATIONS = {
    (_gated_add_op, "CPU"): _gated_add_cpu,
    (_gated_add_op, "CUDA"): _gated_add_cuda,
    (_gate_projected_add_op, "CPU"): _gate_projected_add_cpu,
    (_gate_projected_add_op, "CUDA"): _gate_projected_add_cuda,
}
_library.impl("gated_add", _gated_add_cpu, "CPU")
_library.impl("gated_add", _gated_add_cuda, "CUDA")
_library.impl("gated_add", _gated_add_autograd, "Autograd", with_keyset=True)
_library.impl("_gated_add_out", _gated_add_out_cpu, "CPU")
_library.impl("_gated_add_out", _gated_add_out_cuda, "CUDA")
_library.impl("gate_projected_add", _gate_projected_add_cpu, "CPU")
_library.impl("gate_projected_add", _gate_projected_add_cuda, "CUDA")
_library.impl("gate_projected_add", _gate_projected_add_autograd, "Autograd", with_keyset=True)
torch.library.register_fake("fusionpass::gated_add", _gated_add_fake, lib=_library)
torch.library.register_fake("fusionpass::_gated_add_out", lambda a, gate, b, out: None, lib=_library)
torch.library.register_fake("fusionpass::gate_projected_add", _gate_projected_add_fake, lib=_library)


# The function for people.


def gated_add(a: Tensor, gate: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """a + sigmoid(gate) * b in one pass over memory.

    Args:
        a: `[..., H]`, bfloat16, float16 or float32, on any device; any strides.
        gate: `[...]` or `[..., 1]`, one logit per row, or `[..., H]`, one per element; dtype and device of `a`. Which of
            them it is follows from its number of dims and its sizes, never from how many elements it has.
        b: as `a`.
        out: where to write: shape, dtype and device of `a`, any strides that give each element its own memory. `out=a`
            works in place. It may share memory with an input only by being that very view of `a`, `b` or an `[..., H]`
            gate, or where the two provably have no element in common, such as two halves of one `[T, 2 * H]` buffer.

    Returns:
        `out` if it was given, else a new tensor with the strides of `a + torch.sigmoid(gate) * b`.

    Numerics: computed in fp32 and rounded once to the dtype, where the eager expression rounds three times. inf, nan
    and -0.0 behave as in the expression. Differentiable in all three inputs unless `out` is given.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype, device or layout is none of the above; `out` has elements that share memory, overlaps
            an input, or is used where autograd records. The message names the argument; `out` is untouched.

    >>> import torch
    >>> a, b = torch.ones(2, 3), torch.ones(2, 3)
    >>> gated_add(a, torch.zeros(2), b)
    tensor([[1.5000, 1.5000, 1.5000],
            [1.5000, 1.5000, 1.5000]])
    >>> gated_add(a, torch.zeros(2, 1), b, out=a) is a
    True
    """
    named = {"a": a, "gate": gate, "b": b} if out is None else {"a": a, "gate": gate, "b": b, "out": out}
    _check_public(named)
    if gate.dim() < a.dim():
        gate = gate.unsqueeze(-1)
    if out is None:
        return _gated_add_op(a, gate, b)
    if torch.is_grad_enabled() and any(t.requires_grad for t in named.values()):
        raise ValueError("gated_add: out does not record gradients and an argument requires them; use out=None")
    if _transforms_active():
        raise ValueError("gated_add: out carries no derivative through torch.func or forward-mode AD; use out=None")
    # Tracers' tensors have no address to compare, and a tracer turns the copy into a plain write of the result.
    if torch.compiler.is_compiling() or out.is_meta or any(type(t) not in _PLAIN for t in named.values()):
        return out.copy_(_gated_add_op(a, gate, b))
    if overlap.overlaps_itself(out):
        given = f"shape {contract.listed(out.shape)} and strides {contract.listed(out.stride())}"
        raise ValueError(f"gated_add: out has {given}, allowed: strides that give each element its own memory")
    for name, tensor in (("a", a), ("gate", gate), ("b", b)):
        if not (overlap.same_view(out, tensor) or overlap.disjoint(out, tensor)):
            allowed = "the very same view, or no element in common"
            raise ValueError(f"gated_add: out shares memory with {name}, allowed: {allowed}")
    _gated_add_out_op(a, gate, b, out)
    return out


def _check_public(named: dict[str, Tensor]) -> None:
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"gated_add: {name} is {type(tensor).__name__}, allowed: torch.Tensor")
        if tensor.layout != torch.strided:
            raise ValueError(f"gated_add: {name} has layout {tensor.layout}, allowed: torch.strided")
    a, gate = named["a"], named["gate"]
    problem = contract.kind_problem(named)
    if problem is None and a.dim() == 0:
        problem = "a has no dims, allowed: one or more"
    for name in ("b", "out"):
        if problem is None and name in named and named[name].shape != a.shape:
            problem = f"{name} is {contract.listed(named[name].shape)}, allowed: {contract.listed(a.shape)} as a"
    if problem is None:
        rows, per_row = a.shape[:-1], gate.dim() == a.dim() - 1
        fits = gate.shape == rows if per_row else gate.dim() == a.dim() and gate.shape in ((*rows, 1), a.shape)
        if not fits:
            allowed = (rows, (*rows, 1), a.shape)
            allowed = " or ".join(map(contract.listed, allowed))
            problem = f"gate is {contract.listed(gate.shape)}, allowed: {allowed} for a {contract.listed(a.shape)}"
    if problem is not None:
        raise ValueError(f"gated_add: {problem}")
