"""What does calling a leaf module do? Only an untouched module of torch.nn is known to compute what its class says.

People replace `forward` on an instance or a class (accelerate's hooks, Liger's and unsloth's patches), register hooks on one
module or on all, write subclasses, and reparametrise weights. A graph of `symbolic_trace` shows none of it: such a module is
not plain, and what is not plain may write any memory.
"""

from __future__ import annotations

import os

import torch
from torch.nn.modules.batchnorm import _NormBase

from fusionpass.private import _has_any_global_hook

_TORCH = os.path.dirname(torch.__file__) + os.sep


def is_plain(module: torch.nn.Module) -> bool:
    """Whether a call of the module runs torch's own `forward` of its class, and nothing else."""
    return _is_of_torch(module) and not has_hooks(module)


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether calling the module runs forward or backward hooks besides its forward: its own, or those of all modules."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )


def is_pure(module: torch.nn.Module | None) -> bool:
    """Whether a call of the module is known to write nothing: no memory it was given, no state of its own."""
    return module is not None and is_plain(module) and not _keeps_state(module) and all(map(is_pure, module.children()))


def _is_of_torch(module: torch.nn.Module) -> bool:
    kind = type(module)
    if not kind.__module__.startswith("torch.nn.modules") or "forward" in module.__dict__:
        return False
    return all(_written_in_torch(method) for method in (kind.forward, kind.__call__))


def _written_in_torch(function: object) -> bool:
    """By the file of its code: a patch made with `functools.wraps` has torch's name and module, but not its file."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.startswith(_TORCH)


def _keeps_state(module: torch.nn.Module) -> bool:
    if getattr(module, "inplace", False) or isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
        return True
    if isinstance(module, _NormBase):
        return module.track_running_stats  # in eval too: the graph's owner may go back to training
    return getattr(module, "max_norm", None) is not None  # an embedding that renormalises its rows
