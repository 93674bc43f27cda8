"""The ops under autocast: each does what the nodes that it stands for do there. See `under_autocast` in their modules.

Below these functions autocast is off, so that the ops' own arithmetic is not rounded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusionpass.private import _DisableAutocast, _is_any_autocast_enabled

DEVICES = ("CPU", "CUDA", "XPU", "MPS", "HPU", "PrivateUse1")


def cast(tensor: Tensor | None) -> Tensor | None:
    """To autocast's dtype what autocast casts: floating-point tensors but those in float64."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def passed_by(op: Callable) -> Callable:
    """The op with autocast off: for those that compute what another op's function here, or autograd, calls them for."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _DisableAutocast():
            return op(*args, **kwargs)

    return call


def without_autocast(function: Callable) -> Callable:
    """The function with autocast off inside: its ATen ops compute in the dtypes they are given."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not _is_any_autocast_enabled():
            return function(*args, **kwargs)
        with _DisableAutocast():
            return function(*args, **kwargs)

    return wrapped
