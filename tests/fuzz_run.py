"""One run of a program's text: its scope, its inputs, and what a call has left behind."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import fuzz_ops
import numpy as np
import torch
import torch.nn.functional as F
from fuzz_compare import streams
from fuzz_modules import patch
from programs import DEVICE, operands
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SHAPES = (4, 6), (4, 6), (4, 1), (1, 6), (8, 6), (4, 2), (6,)
ORDER = (3, 0, 7, 1, 6, 2, 5, 4)


class Skipped(Exception):
    """The program cannot run without the pass, or a tracer refuses it, so there is nothing to compare."""


@dataclass
class Run:
    """What one call has left behind: results, inputs, the tensor that the program knows by itself; gradients."""

    outputs: list[Tensor]
    tensors: list[Tensor]
    streams: list[Tensor]

    def values(self) -> list[Tensor]:
        """As they are now: a later run writes into the tensor that the program knows by itself."""
        return [t.detach().clone() for t in self.tensors]


def built(source: str) -> SimpleNamespace:
    (known,) = operands((4, 6), seed=1)
    scope = {
        "torch": torch,
        "F": F,
        "np": np,
        "contextlib": contextlib,
        "checkpoint": checkpoint,
        "fuzzlib": torch.ops.fuzzlib,
        "reshape": fuzz_ops.reshape,
        "detach": fuzz_ops.detach,
        "setitem": operator.setitem,
        "iadd": operator.iadd,
        "patch": patch,
        "doubled": lambda grads: tuple(x if x is None else x * 2 for x in grads),
        "DEVICE": DEVICE,
        "register_module_forward_hook": torch.nn.modules.module.register_module_forward_hook,
        "register_module_forward_pre_hook": torch.nn.modules.module.register_module_forward_pre_hook,
        "register_module_full_backward_hook": torch.nn.modules.module.register_module_full_backward_hook,
    }
    scope["__name__"] = "fuzzed"
    exec("torch.fx.wrap('reshape'); torch.fx.wrap('detach')\n" if "symbolic_trace" in source else "", scope)
    exec(source, scope)
    scope["P"] = known.to(scope["DTYPE"])
    scope["P0"] = scope["P"].clone()
    return SimpleNamespace(**scope)


def inputs(dtype: torch.dtype, requires_grad: bool = False) -> list[Tensor]:
    floats = [t.requires_grad_(requires_grad) for t in operands(*SHAPES, dtype=dtype)]
    order = torch.tensor(ORDER, device=DEVICE)
    return [*floats, order, order.view(4, 2) > 5]


def called(function: Callable, share: Callable, scope: SimpleNamespace) -> Run:
    with torch.no_grad(), scope.AROUND:
        args = share(*inputs(scope.DTYPE))
        # In its own shape: Dynamo by itself leaves it transposed where `a.t_(); a.t_()` ran on it. In its own memory: a
        # graph of make_fx holds that, not the tensor.
        scope.P.as_strided_(scope.P0.shape, scope.P0.stride()).copy_(scope.P0)
        if any(arg is scope.P for arg in args):
            args = [scope.P if arg is scope.P else arg for arg in args]
        torch.manual_seed(0)
        outputs = list(function(*args))
        return Run(outputs, [*outputs, *args, scope.P], streams())


def attempted(function: Callable, *args: Any) -> Any:
    """What the call gives without the pass; when it raises, there is nothing to compare."""
    try:
        return function(*args)
    except Exception as error:  # whatever it is, it is not of the pass
        raise Skipped(f"{type(error).__name__}: {error}") from error
