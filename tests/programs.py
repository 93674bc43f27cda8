"""Small programs around the formula, and the ways to capture them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx.experimental.proxy_tensor import make_fx

import fusionpass
from fusionpass.report import Report

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def operands(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    """Random tensors, one per shape."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def abg(rows: int = 4, width: int = 8, dtype: torch.dtype = torch.float32, gate_width: int = 1) -> list[torch.Tensor]:
    """a, b of [rows, width] and a gate of [rows, gate_width]."""
    a, b, gate = operands((rows, width), (rows, width), (rows, gate_width), dtype=dtype)
    return [a, b, gate]


def captured(function: Callable, *args, **options) -> Report:
    """The report of the Dynamo backend, with inner "eager", over one run of `function`."""
    return fusionpass.explain(function, **options)(*args)


def through_make_fx(function: Callable, *args, mode: str = "fake") -> fusionpass.Rewritten:
    return fusionpass.rewrite(make_fx(function, tracing_mode=mode)(*args))


def through_export(function: Callable, *args) -> fusionpass.Rewritten:
    class Program(torch.nn.Module):
        def forward(self, *inputs):
            return function(*inputs)

    return fusionpass.rewrite(torch.export.export(Program(), tuple(args), strict=False))


def fresh(args) -> list:
    """Copies of the arguments that keep strides and overlaps of views within one tensor."""
    return [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
