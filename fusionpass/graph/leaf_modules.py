"""What does calling a leaf module do? Only an untouched module of torch.nn is known to compute what its class says.

People replace `forward` on an instance or a class (accelerate's hooks, Liger's and unsloth's patches), register hooks on one
module or on all, write subclasses, and reparametrise weights. A graph of `symbolic_trace` shows none of this. A module
with any of it is not plain, and a module that is not plain may write any memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _NormBase

from fusionpass.graph.identity import written_in_torch
from fusionpass.private import _has_any_global_hook


def is_plain(module: torch.nn.Module) -> bool:
    """Whether a call of the module runs torch's own `forward` of its class, and nothing else."""
    return _is_of_torch(module) and not has_hooks(module)


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether calling the module also runs forward or backward hooks: its own, or those of all modules."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )


def is_pure(module: torch.nn.Module | None) -> bool:
    """Whether a call of the module is known to write nothing: neither memory that it was given nor its own state."""
    return module is not None and is_plain(module) and not _keeps_state(module) and all(map(is_pure, module.children()))


def _is_of_torch(module: torch.nn.Module) -> bool:
    kind = type(module)
    if not kind.__module__.startswith("torch.nn.modules") or not _REPLACEABLE.isdisjoint(module.__dict__):
        return False
    if getattr(module, "_compiled_call_impl", None) is not None:
        return False
    methods = (kind.forward, kind.__call__, kind._wrapped_call_impl, kind._call_impl)
    return all(map(written_in_torch, methods)) and _functions_are_torchs()


_REPLACEABLE = frozenset(("forward", "_call_impl", "_wrapped_call_impl"))


def _functions_are_torchs() -> bool:
    """Whether the functions that the formula's modules call are torch's own: shims for adapters and quantised weights
    patch them."""
    return (
        F.linear is torch._C._nn.linear
        and torch.sigmoid is torch._C._VariableFunctions.sigmoid
        and written_in_torch(F.rms_norm)
        and written_in_torch(F.dropout)
    )


def _keeps_state(module: torch.nn.Module) -> bool:
    if getattr(module, "inplace", False) or isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
        return True
    if isinstance(module, _NormBase):
        return module.track_running_stats  # in eval too: the user may go back to training
    return getattr(module, "max_norm", None) is not None  # then an embedding renormalises its rows
