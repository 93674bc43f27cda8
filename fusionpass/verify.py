"""The op in place of the nodes must give a result of the same shape, dtype, device and strides, in memory of its own.

Later nodes may depend on any of these: `.view` raises on other strides, Inductor asserts them. Asked of the op's own fake
kernel, not assumed; where every operand is contiguous the answer is known unasked (one fake call takes 0.2 ms).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fusionpass.match import Projection, Refusal, Site
from fusionpass.private import FakeTensorMode
from fusionpass.tensors import known_contiguous, same_sizes, same_strides, tensor_of


def same_result(site: Site, projection: Projection | None = None) -> Refusal | None:
    """None when the op gives what the sum gives, as far as a tensor's metadata goes."""
    a, gate, b, total = tensor_of(site.a), *_viewed(site), tensor_of(site.add)
    if all(map(known_contiguous, (a, gate, b, total))):
        return None
    parts = () if projection is None else (projection.x, projection.weight, projection.bias)
    if any(isinstance(part, str) for part in parts):  # a parameter of a module, for which nothing is recorded
        parts = ()
    given = _given([a, gate, b], [tensor_of(part) for part in parts], total.dtype)
    if not same_sizes(given.shape, total.shape) or given.dtype != total.dtype or given.device != total.device:
        return Refusal("result", "the op would give {}, eager gives {}", given, total)
    if not same_strides(given, total):
        strides = tuple(given.stride()), tuple(total.stride())
        return Refusal("stride", "the op would give strides {}, eager gives {}", *strides)
    return None


def _viewed(site: Site) -> tuple[Tensor, Tensor]:
    """The gate and b in the shapes in which the formula sees them."""
    gate, b = tensor_of(site.gate), tensor_of(site.b)
    return reshaped(gate, site.gate_shape), reshaped(b, site.b_shape)


def reshaped(tensor: Tensor, shape: Sequence[Any] | None) -> Tensor:
    """A recorded tensor in another shape, None for its own."""
    if shape is None or same_sizes(tensor.shape, shape):
        return tensor
    with torch.no_grad(), getattr(tensor, "fake_mode", None) or nullcontext():
        return tensor.reshape(shape)


def _given(formula: Sequence[Tensor], projected: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    """What the op makes of tensors laid out as those recorded, whichever kind these are: it runs on fakes of one mode.

    A tracer may have recorded real tensors, ones of the meta device, or fakes of a mode each, as make_fx's mode "real" does.
    """
    operands = [*formula, *projected]
    modes = {getattr(operand, "fake_mode", None) for operand in operands if operand is not None}
    mode = modes.pop() if len(modes) == 1 else None
    if mode is None:
        mode = fake_mode_for(operands)
        operands = [None if operand is None else as_fake(operand, mode) for operand in operands]
    a, gate, b = operands[:3]
    options = {} if a.dtype == gate.dtype == b.dtype == dtype else {"dtype": dtype}
    with torch.no_grad(), mode:
        if not projected:
            return torch.ops.fusionpass.gated_add(a, gate, b, **options)
        return torch.ops.fusionpass.gate_projected_add(*operands[3:], a, b, **options)


def as_fake(tensor: Tensor, mode: Any) -> Tensor:
    """A fake in memory of its own, with the tensor's shape, dtype, device and strides."""
    with mode, torch.no_grad():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def fake_mode_for(tensors: Iterable[Tensor | None]) -> Any:
    """A new mode that knows the symbols among the tensors' sizes."""
    sizes = (size for tensor in tensors if tensor is not None for size in (*tensor.shape, *tensor.stride()))
    symbol = next((size for size in sizes if isinstance(size, torch.SymInt)), None)
    return FakeTensorMode(shape_env=None if symbol is None else symbol.node.shape_env)
