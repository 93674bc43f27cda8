"""The ops under autocast: each op does what its nodes would do there. See `under_autocast` in the modules of the ops.

These functions turn autocast off for the code that they call, so that the ops' own arithmetic is not rounded.
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
    """The tensor in autocast's dtype, if autocast casts it: floating-point tensors other than float64."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def passed_by(op: Callable) -> Callable:
    """The op with autocast off, for ops that only autograd or another op's function here calls."""

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
