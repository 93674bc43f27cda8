"""What stands between a call of an op and the code that computes it: modes, tracers, transforms, autograd; and the way
past them.

`torch.library.register_autograd` would be enough for the ops' gradients, except for one thing: it has no forward-mode
rule, and silently gives a tangent of zero. So the Autograd kernels are written out. If a functorch transform or a dual
level is active, they compute the op's expression in differentiable ATen ops instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusionpass.operators.declaration import Op
from fusionpass.private import (
    DispatchKey,
    DispatchKeySet,
    _after_autograd_keyset,
    _are_functorch_transforms_active,
    _AutoDispatchBelowAutograd,
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
    """Whether ops on these tensors do exactly what the implementation for their device does: no mode, tracer, transform,
    autocast or subclass is at work. This check is far cheaper than the dispatcher and a Python Autograd kernel."""
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


# Takes an op, returns the function that computes it beneath autograd.
Beneath = Callable[[Op], Callable[..., Any]]


def run_of(op: Op) -> Callable[..., Any]:
    """The implementation itself, for plain tensors."""
    return op.run


def _plain_keys() -> set[int]:
    """The key sets, below Autograd, of ordinary CPU and CUDA tensors with no mode or transform at work."""
    dense = [DispatchKeySet(getattr(DispatchKey, device)) for device in ("CPU", "CUDA")]
    return {key_set.raw_repr() for one in dense for key_set in (one, one.add(DispatchKey.ADInplaceOrView))}


_PLAIN_KEYS = _plain_keys()


def beneath(keyset: Any) -> Beneath:
    """What the dispatcher would run next, from an Autograd kernel's key set. For plain keys this is the implementation,
    which is called without the dispatcher."""
    below = keyset & _after_autograd_keyset
    if below.raw_repr() in _PLAIN_KEYS:
        return run_of

    def redispatched(op: Op) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with _AutoDispatchBelowAutograd():
                return op.overload.redispatch(below, *args, **kwargs)

        return call

    return redispatched
