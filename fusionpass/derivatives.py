"""The ops under autograd.

`torch.library.register_autograd` would do but for one thing: it has no forward-mode rule, and then gives a tangent of
zero without a word. So the Autograd kernels are written out, and where a functorch transform or a dual level is active
they compute the expression in differentiable ATen ops instead.

The same functions with `keyset` None are the ops without the dispatcher, for plain tensors: see `fusionpass.direct`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusionpass import implementations, library
from fusionpass.kernels import aten, aten_combine, contract
from fusionpass.private import (
    DispatchKey,
    DispatchKeySet,
    _after_autograd_keyset,
    _are_functorch_transforms_active,
    _AutoDispatchBelowAutograd,
    _DisableAutocast,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)

PLAIN = (Tensor, torch.nn.Parameter)

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


def transforms_active() -> bool:
    return forward_ad._current_level >= 0 or _are_functorch_transforms_active()


def plain(*tensors: Tensor | None) -> bool:
    """Whether ops on these tensors mean what the implementation for their device does: no mode, tracer, transform,
    autocast or subclass is at work.

    1 us for three tensors, where the dispatcher and a Python Autograd kernel take 8 to 10 (an H200 host).
    """
    if (
        _is_dynamo_compiling()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _get_tracing_state() is not None
        or _is_any_autocast_enabled()
    ):
        return False
    return not any([t is not None and (type(t) not in PLAIN or t.is_neg()) for t in tensors])


def recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd records an op on these tensors."""
    return torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])


def _plain_keys() -> set[int]:
    """The key sets, below Autograd, of ordinary CPU and CUDA tensors with no mode or transform at work."""
    dense = [DispatchKeySet(getattr(DispatchKey, device)) for device in ("CPU", "CUDA")]
    return {key_set.raw_repr() for one in dense for key_set in (one, one.add(DispatchKey.ADInplaceOrView))}


_PLAIN_KEYS = _plain_keys()
_IMPLEMENTATIONS = {
    library.gated_add: implementations.gated_add,
    library.gate_projected_add: implementations.gate_projected_add,
    library.gate_projected_add_and_logit: implementations.gate_projected_add_and_logit,
    library.moe_combine: implementations.moe_combine,
}


def _below_autograd(op, keyset, *args, **kwargs) -> Tensor:
    """What the dispatcher would run next; for plain keys the implementation itself, which spares 15 us of the host.

    keyset: the dispatcher's, or None for plain tensors.
    """
    if keyset is None:
        return _IMPLEMENTATIONS[op](*args, **kwargs)
    below = keyset & _after_autograd_keyset
    if below.raw_repr() in _PLAIN_KEYS:
        return _IMPLEMENTATIONS[op](*args, **kwargs)
    with _AutoDispatchBelowAutograd():
        return op.redispatch(below, *args, **kwargs)


def without_autocast(function: Callable) -> Callable:
    """The function with autocast off inside: its ATen ops compute in the dtypes they are given."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not _is_any_autocast_enabled():
            return function(*args, **kwargs)
        with _DisableAutocast():
            return function(*args, **kwargs)

    return wrapped


class _GatedAdd(torch.autograd.Function):
    """`gate` is a copy of the caller's where gradients read it: see `gated_add`."""

    @staticmethod
    def forward(ctx, keyset, numerics, dtype, a, gate, b):
        ctx.numerics, ctx.dtypes = numerics, (a.dtype, b.dtype)
        _, need_gate, need_b = ctx.needs_input_grad[3:]
        ctx.save_for_backward(gate if need_gate or need_b else None, b if need_gate else None)
        return _below_autograd(library.gated_add, keyset, a, gate, b, numerics=numerics, dtype=dtype)

    @staticmethod
    @without_autocast
    def backward(ctx, dy):
        gate, b = ctx.saved_tensors
        need_a, need_gate, need_b = needs = ctx.needs_input_grad[3:]
        # The op has no derivative of its own: where one may be asked for, ATen's ops have.
        if need_gate and need_b and ctx.numerics == "fp32" and not torch.is_grad_enabled():
            dgate, db = library.gated_add_backward(dy, gate, b)
            return None, None, None, dy.to(ctx.dtypes[0]) if need_a else None, dgate, db
        return None, None, None, *aten.gated_add_gradients(dy, gate, b, ctx.numerics, needs, ctx.dtypes)


class _GateProjectedAdd(torch.autograd.Function):
    """(y, logit). What it saves is what the unfused nodes save, with the logit for its sigmoid.

    The logit is a result so that a second derivative, which also goes through it, finds its way back.
    """

    @staticmethod
    def forward(ctx, keyset, dtype, x, weight, bias, a, b):
        need_x, need_weight, need_bias, _, need_b = ctx.needs_input_grad[2:]
        need_logit = need_x or need_weight or need_bias
        ctx.set_materialize_grads(False)
        ctx.rows, ctx.dtypes = x.shape[:-1], (a.dtype, b.dtype)
        ctx.shapes = weight.shape, None if bias is None else bias.shape
        if not (need_logit or need_b):
            return _below_autograd(library.gate_projected_add, keyset, x, weight, bias, a, b, dtype=dtype), None
        op = library.gate_projected_add_and_logit
        y, logit = _below_autograd(op, keyset, x, weight, bias, a, b, dtype=dtype)
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None, logit, b if need_logit else None)
        return y, logit

    @staticmethod
    @without_autocast
    def backward(ctx, dy, dlogit):
        need_x, need_weight, need_bias, need_a, need_b = needs = ctx.needs_input_grad[2:]
        if not (need_x or need_weight or need_bias or need_b):
            return None, None, None, None, None, None if dy is None else dy.to(ctx.dtypes[0]), None
        x, weight, logit, b = ctx.saved_tensors
        if need_x and need_b and dy is not None and dlogit is None and not torch.is_grad_enabled():
            dx, dweight, dbias, db = library.gate_projected_add_backward(dy, x, weight, logit, b, ctx.rows, need_bias)
            da = dy.to(ctx.dtypes[0]) if need_a else None
        else:
            gradients = aten.gate_projected_add_gradients(dy, dlogit, x, weight, logit, b, needs, ctx.dtypes)
            dx, dweight, dbias, da, db = gradients
            dx = None if dx is None else dx.reshape(*ctx.rows, dx.shape[-1])
        weight_shape, bias_shape = ctx.shapes
        dweight = dweight.reshape(weight_shape) if need_weight else None
        return None, None, dx, dweight, dbias.reshape(bias_shape) if need_bias else None, da, db


class _RmsNorm(torch.autograd.Function):
    """It saves the rows and the weight alone, and computes the rest of what its gradients need anew."""

    @staticmethod
    def forward(ctx, total, weight, eps, offset):
        ctx.options = eps, offset
        ctx.save_for_backward(total, weight)
        return aten_combine.norm_nodes(total, weight, eps, offset).to(total.dtype)

    @staticmethod
    @without_autocast
    def backward(ctx, dy):
        gradients = aten_combine.rms_norm_gradients(dy, *ctx.saved_tensors, *ctx.options, ctx.needs_input_grad[:2])
        return *gradients, None, None


def gated_add(
    keyset, a: Tensor, gate: Tensor, b: Tensor, *, numerics: str = "fp32", dtype: torch.dtype | None = None
) -> Tensor:
    """The op's Autograd kernel.

    The unfused nodes save the sigmoid, which is memory of their own: who writes the gate after the sum does not change
    the gradients. So does this: it saves a copy of the gate, of the sigmoid's size and dtype.
    """
    if transforms_active():
        contract.check_gated_add(a, gate, b, numerics, dtype)
        return aten.gated_add_expression(a, gate, b, numerics, dtype)
    if recorded(a, gate, b):
        if gate.requires_grad or b.requires_grad:
            gate = gate.clone()
        return _GatedAdd.apply(keyset, numerics, dtype, a, gate, b)
    return _below_autograd(library.gated_add, keyset, a, gate, b, numerics=numerics, dtype=dtype)


def gate_projected_add(
    keyset, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *, dtype: torch.dtype | None = None
) -> Tensor:
    """The op's Autograd kernel."""
    if transforms_active():
        contract.check_gate_projected_add(x, weight, bias, a, b, dtype)
        return aten.gate_projected_add_expression(x, weight, bias, a, b, dtype)
    if recorded(x, weight, bias, a, b):
        return _GateProjectedAdd.apply(keyset, dtype, x, weight, bias, a, b)[0]
    return _below_autograd(library.gate_projected_add, keyset, x, weight, bias, a, b, dtype=dtype)


def moe_combine(keyset, a: Tensor, b: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The op's Autograd kernel: it has no backward of its own, so where gradients are recorded its steps are taken."""
    transformed = transforms_active()
    if not (transformed or recorded(a, b, *(value for value in options.values() if isinstance(value, Tensor)))):
        return _below_autograd(library.moe_combine, keyset, a, b, **options)
    implementations.check_combine(a, b, options)
    arguments = implementations.combine_arguments(a, b, **options)
    return aten_combine.moe_combine_expression(*arguments) if transformed else _recorded_combine(arguments)


def _recorded_combine(arguments: tuple) -> tuple[Tensor, Tensor]:
    """moe_combine from ops that have gradients, which save no more than the nodes it replaces, and round no oftener."""
    a, b, gate, x, *_, residual, _, _, _, _, _, dtype = arguments
    final = contract.combined_dtype(dtype, a, b, gate, x, residual)
    of_core = final if residual is None else contract.combined_dtype(None, a, b, gate, x, None)

    def projected(x, weight, bias, a, b):
        return library.gate_projected_add(x, weight, bias, a, b, dtype=of_core)

    def gated(a, gate, b):
        return library.gated_add(a, gate, b, dtype=of_core)

    def norm(total, weight, eps, offset):
        # Eager's cast to float32 is a copy too: who writes the sum afterwards does not change the gradients.
        return _RmsNorm.apply(total if total.dtype == torch.float32 else total.clone(), weight, eps, offset)

    return aten_combine.moe_combine_steps(*arguments[:-1], final, projected=projected, gated=gated, norm=norm)
