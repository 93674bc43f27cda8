"""Inputs of a target: `--input "bf16[64,2048]"`, and the `example_inputs` beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fusionpass.targets.types import TargetError

DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "f16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "f32": torch.float32,
    "float32": torch.float32,
    "fp64": torch.float64,
    "f64": torch.float64,
    "float64": torch.float64,
    "i64": torch.int64,
    "int64": torch.int64,
    "i32": torch.int32,
    "int32": torch.int32,
    "bool": torch.bool,
}
_SPEC = re.compile(r"\s*(\w+)\s*\[\s*((?:\d+\s*(?:,\s*\d+\s*)*)?)\]\s*")


def from_spec(spec: str, device: torch.device) -> torch.Tensor:
    """A tensor for a spec such as `bf16[64,2048]`: random floats, zero integers (valid indices), true booleans."""
    found = _SPEC.fullmatch(spec)
    if found is None:
        raise TargetError(f'input {spec!r} is no dtype[sizes]: write for example "bf16[64,2048]" or "i64[2,9]"')
    name, sizes = found[1], [int(size) for size in found[2].split(",") if size.strip()]
    if name not in DTYPES:
        raise TargetError(f"input {spec!r} has the unknown dtype {name!r}: use one of {', '.join(DTYPES)}")
    dtype = DTYPES[name]
    try:
        if device.type == "meta":
            return torch.empty(sizes, dtype=dtype, device=device)
        if dtype.is_floating_point:
            values = torch.randn(sizes, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
            return values.to(device=device, dtype=dtype)
        return (torch.ones if dtype is torch.bool else torch.zeros)(sizes, dtype=dtype, device=device)
    except RuntimeError as error:
        raise TargetError(f"input {spec!r} cannot be allocated on {device}: make it smaller, or use meta") from error


def as_call(given: Any, where: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`example_inputs` as (args, kwargs): a tuple or list gives args, a mapping named ones, a tensor one argument."""
    if callable(given) and not isinstance(given, torch.Tensor):
        try:
            given = given()
        except Exception as error:
            raise TargetError(
                f"{where} could not be called: {type(error).__name__}: {error}; make it a tuple, a dict, "
                "or a function of no arguments that returns one"
            ) from error
    if isinstance(given, torch.Tensor):
        return (given,), {}
    if isinstance(given, Mapping) and all(isinstance(key, str) for key in given):
        return (), dict(given)
    if isinstance(given, Sequence) and not isinstance(given, (str, bytes)):
        return tuple(given), {}
    kind = type(given).__name__
    raise TargetError(f"{where} is of type {kind}: make it a tuple of positional inputs or a dict of named ones")


def moved(value: Any, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    """`value` with its tensors on `device`, floating ones in `dtype`; None leaves that as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(item, device, dtype) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(moved(item, device, dtype) for item in value)
    if isinstance(value, dict):
        return {key: moved(item, device, dtype) for key, item in value.items()}
    return value
