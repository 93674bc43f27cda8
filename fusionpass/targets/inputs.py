"""Inputs of a target: from `--input "bf16[64,2048]"`, or from `example_inputs` beside the target."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fusionpass.targets.memory import MOST_BYTES, bytes_needed, obstacle
from fusionpass.targets.types import TargetError, first_line

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
MOST_DIGITS = 30  # how many digits of a size are read
_SPEC = re.compile(r"\s*(\w+)\s*\[\s*((?:\d+\s*(?:,\s*\d+\s*)*)?)\]\s*")


def from_spec(spec: str, device: torch.device) -> torch.Tensor:
    """A tensor for a spec such as `bf16[64,2048]`: random floats, zero integers (valid indices), true booleans."""
    found = _SPEC.fullmatch(spec)
    if found is None:
        raise TargetError(f'--input {spec!r} is no dtype[sizes]: write for example "bf16[64,2048]" or "i64[2,9]"')
    name = found[1]
    if name not in DTYPES:
        raise TargetError(f"--input {spec!r} has the unknown dtype {name!r}: use one of {', '.join(DTYPES)}")
    words = [word.strip() for word in found[2].split(",") if word.strip()]
    sizes = [int(word[:MOST_DIGITS]) for word in words]  # the first digits of a longer number are too large already
    dtype = DTYPES[name]
    made = torch.float32 if dtype.is_floating_point and device.type != "meta" else dtype
    needed = max(bytes_needed(sizes, made), bytes_needed(sizes, dtype))
    why = obstacle(needed, device)
    if why:
        step = "make it smaller" + ("" if needed > MOST_BYTES else _or_meta(device))
        raise TargetError(f"--input {_short(spec)!r} is too large: {why}; {step}")
    try:
        return _filled(sizes, dtype, device)
    except RuntimeError as error:
        raise TargetError(
            f"--input {spec!r} cannot be allocated on {device} ({first_line(error)}): make it smaller{_or_meta(device)}"
        ) from error


def _filled(sizes: list[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type == "meta":
        return torch.empty(sizes, dtype=dtype, device=device)
    if dtype.is_floating_point:
        values = torch.randn(sizes, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        return values.to(device=device, dtype=dtype)
    return (torch.ones if dtype is torch.bool else torch.zeros)(sizes, dtype=dtype, device=device)


def _or_meta(device: torch.device) -> str:
    return "" if device.type == "meta" else ", or add --device meta"


def _short(spec: str) -> str:
    return spec if len(spec) <= 80 else f"{spec[:60]}...{spec[-10:]}"


def as_call(given: Any, where: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`example_inputs` as (args, kwargs). A tuple or list gives args, a mapping gives kwargs, a tensor gives one
    argument."""
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
    """`value` with its tensors on `device`, and floating ones in `dtype`. None changes nothing."""
    if isinstance(value, torch.Tensor):
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(item, device, dtype) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(moved(item, device, dtype) for item in value)
    if isinstance(value, dict):
        return {key: moved(item, device, dtype) for key, item in value.items()}
    return value
