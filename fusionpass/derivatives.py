"""The ops under autograd.

`torch.library.register_autograd` would do but for one thing: it has no forward-mode rule, and then gives a tangent of
zero without a word. So the Autograd kernels are written out, and where a functorch transform or a dual level is active
they compute the expression in differentiable ATen ops instead.

The same functions with `keyset` None are the ops without the dispatcher, for plain tensors: see `fusionpass.direct`.
"""

from __future__ import annotations

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
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)

PLAIN = (Tensor, torch.nn.Parameter)

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


def transforms_active() -> bool:
    return forward_ad._current_level >= 0 or _are_functorch_transforms_active()


def plain(*tensors: Tensor | None) -> bool:
    """Whether ops on these tensors mean what the implementation for their device does: no mode, tracer, transform or
    subclass is at work.

    1 us for three tensors, where the dispatcher and a Python Autograd kernel take 8 to 10 (an H200 host).
    """
    if (
        _is_dynamo_compiling()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _get_tracing_state() is not None
    ):
        return False
    return not any([t is not None and (type(t) not in PLAIN or t.is_neg()) for t in tensors])


def recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd records an op on these tensors."""
    return torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])


def _plain_keys() -> dict[int, str]:
    """The key sets, below Autograd, of ordinary CPU and CUDA tensors with no mode or transform at work."""
    keys = {}
    for device in ("CPU", "CUDA"):
        dense = DispatchKeySet(getattr(DispatchKey, device))
        for key_set in (dense, dense.add(DispatchKey.ADInplaceOrView)):
            keys[key_set.raw_repr()] = device
    return keys


_PLAIN_KEYS = _plain_keys()
_IMPLEMENTATIONS = {
    (library.gated_add, "CPU"): implementations.gated_add_cpu,
    (library.gated_add, "CUDA"): implementations.gated_add_cuda,
    (library.gate_projected_add, "CPU"): implementations.gate_projected_add_cpu,
    (library.gate_projected_add_and_logit, "CPU"): implementations.gate_projected_add_and_logit_cpu,
    (library.gate_projected_add_and_logit, "CUDA"): implementations.gate_projected_add_and_logit_cuda,
    (library.gate_projected_add, "CUDA"): implementations.gate_projected_add_cuda,
    (library.moe_combine, "CPU"): implementations.moe_combine_cpu,
    (library.moe_combine, "CUDA"): implementations.moe_combine_cuda,
}


def _below_autograd(op, keyset, *args, **kwargs) -> Tensor:
    """What the dispatcher would run next; for plain keys the implementation itself, which spares 15 us of the host.

    keyset: the dispatcher's, or None for plain tensors.
    """
    if keyset is None:
        return _IMPLEMENTATIONS[op, args[0].device.type.upper()](*args, **kwargs)
    below = keyset & _after_autograd_keyset
    device = _PLAIN_KEYS.get(below.raw_repr())
    if device is not None:
        return _IMPLEMENTATIONS[op, device](*args, **kwargs)
    with _AutoDispatchBelowAutograd():
        return op.redispatch(below, *args, **kwargs)


class _GatedAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keyset, numerics, a, gate, b):
        ctx.numerics = numerics
        _, need_gate, need_b = ctx.needs_input_grad[2:]
        ctx.save_for_backward(gate if need_gate or need_b else None, b if need_gate else None)
        return _below_autograd(library.gated_add, keyset, a, gate, b, numerics=numerics)

    @staticmethod
    def backward(ctx, dy):
        gate, b = ctx.saved_tensors
        need_a, need_gate, need_b = needs = ctx.needs_input_grad[2:]
        # The op has no derivative of its own: where one may be asked for, ATen's ops have.
        if need_gate and need_b and ctx.numerics == "fp32" and not torch.is_grad_enabled():
            dgate, db = library.gated_add_backward(dy, gate, b)
            return None, None, dy if need_a else None, dgate, db
        return None, None, *aten.gated_add_gradients(dy, gate, b, ctx.numerics, needs)


class _GateProjectedAdd(torch.autograd.Function):
    """(y, logit). What it saves is what the unfused nodes save, with the logit for its sigmoid.

    The logit is a result so that a second derivative, which also goes through it, finds its way back.
    """

    @staticmethod
    def forward(ctx, keyset, x, weight, bias, a, b):
        need_x, need_weight, need_bias, _, need_b = ctx.needs_input_grad[1:]
        need_logit = need_x or need_weight or need_bias
        ctx.set_materialize_grads(False)
        ctx.rows = x.shape[:-1]
        ctx.shapes = weight.shape, None if bias is None else bias.shape
        if not (need_logit or need_b):
            return _below_autograd(library.gate_projected_add, keyset, x, weight, bias, a, b), None
        y, logit = _below_autograd(library.gate_projected_add_and_logit, keyset, x, weight, bias, a, b)
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None, logit, b if need_logit else None)
        return y, logit

    @staticmethod
    def backward(ctx, dy, dlogit):
        need_x, need_weight, need_bias, need_a, need_b = needs = ctx.needs_input_grad[1:]
        if not (need_x or need_weight or need_bias or need_b):
            return None, None, None, None, dy, None
        x, weight, logit, b = ctx.saved_tensors
        if need_x and need_b and dy is not None and dlogit is None and not torch.is_grad_enabled():
            dx, dweight, dbias, db = library.gate_projected_add_backward(dy, x, weight, logit, b, ctx.rows, need_bias)
            da = dy if need_a else None
        else:
            dx, dweight, dbias, da, db = aten.gate_projected_add_gradients(dy, dlogit, x, weight, logit, b, needs)
            dx = None if dx is None else dx.reshape(*ctx.rows, dx.shape[-1])
        weight_shape, bias_shape = ctx.shapes
        dweight = dweight.reshape(weight_shape) if need_weight else None
        return None, dx, dweight, dbias.reshape(bias_shape) if need_bias else None, da, db


def gated_add(keyset, a: Tensor, gate: Tensor, b: Tensor, *, numerics: str = "fp32") -> Tensor:
    """The op's Autograd kernel."""
    if transforms_active():
        contract.check_gated_add(a, gate, b, numerics)
        return aten.gated_add_expression(a, gate, b, numerics)
    if recorded(a, gate, b):
        return _GatedAdd.apply(keyset, numerics, a, gate, b)
    return _below_autograd(library.gated_add, keyset, a, gate, b, numerics=numerics)


def gate_projected_add(keyset, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """The op's Autograd kernel."""
    if transforms_active():
        contract.check_gate_projected_add(x, weight, bias, a, b)
        return aten.gate_projected_add_expression(x, weight, bias, a, b)
    if recorded(x, weight, bias, a, b):
        return _GateProjectedAdd.apply(keyset, x, weight, bias, a, b)[0]
    return _below_autograd(library.gate_projected_add, keyset, x, weight, bias, a, b)


def moe_combine(keyset, a: Tensor, b: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The op's Autograd kernel: it has no backward of its own, so where gradients are recorded the expression runs."""
    if transforms_active() or recorded(a, b, *(value for value in options.values() if isinstance(value, Tensor))):
        implementations.check_combine(a, b, options)
        return aten_combine.moe_combine_expression(*implementations.combine_arguments(a, b, **options))
    return _below_autograd(library.moe_combine, keyset, a, b, **options)
