"""The op in place of the nodes must give results of the same shape, dtype, device and strides, in memory of its own.

Later nodes may depend on any of these: `.view` raises on other strides, Inductor asserts them. So the op's own fake
kernel is asked. Our own ops are not asked if every operand is contiguous, because the answer is known (a fake call
takes 0.2 ms).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fusionpass.graph.refusal import Refusal
from fusionpass.graph.tensors import known_contiguous, same_sizes, same_strides, tensor_of
from fusionpass.kernels.contract import listed
from fusionpass.private import FakeTensorMode
from fusionpass.rules.calling import call_of
from fusionpass.rules.site import Operand, Site


def same_result(site: Site) -> Refusal | None:
    """None if the op's results have the same metadata as those of the nodes."""
    wanted = [tensor_of(result) for result in site.results]
    if site.op.contiguous:
        core = (reshaped(tensor_of(operand.value), site.shapes.get(name)) for name, operand in site.core.items())
        if all(map(known_contiguous, core)) and all(map(known_contiguous, wanted)):
            return None
    if any(isinstance(operand.value, str) for operand in site.operands.values()):
        return None  # a parameter of a module, for which nothing is recorded; the core was checked without it
    for given, total in zip(_given(site), wanted, strict=False):
        if not same_sizes(given.shape, total.shape) or given.dtype != total.dtype or given.device != total.device:
            return Refusal("result", "the op would give {}, eager gives {}", given, total)
        if not same_strides(given, total):
            strides = tuple(given.stride()), tuple(total.stride())
            return Refusal("stride", "the op would give strides {}, eager gives {}", *strides)
    return None


def same_shape(site: Site) -> Refusal | None:
    """Whether a grown site's op gives results of the shape that the nodes give: a stage may join behind a view."""
    if not site.op.shaped:
        return None
    wanted = tensor_of(site.end).shape
    for name in site.op.shaped:
        if name in site.operands:
            given = site.shapes.get(name, tensor_of(site.operands[name].value).shape)
            break
    else:
        given = tensor_of(site.anchor).shape
    if same_sizes(given, wanted):
        return None
    return Refusal("shape", "the op would give {}, {} is {}", listed(given), site.end, listed(wanted))


def reshaped(tensor: Tensor, shape: Sequence[Any] | None) -> Tensor:
    """A recorded tensor in another shape, None for its own."""
    if shape is None or same_sizes(tensor.shape, shape):
        return tensor
    with torch.no_grad(), getattr(tensor, "fake_mode", None) or nullcontext():
        return tensor.reshape(shape)


def _given(site: Site) -> Sequence[Tensor]:
    """The op's results for tensors with the recorded layouts. The op runs on fakes of one mode.

    A tracer may have recorded real tensors, tensors of the meta device, or fakes that each have a mode of their own, as
    make_fx's mode "real" does.
    """
    operands = {
        name: reshaped(tensor_of(operand.value), site.shapes.get(name)) for name, operand in site.operands.items()
    }
    modes = {getattr(tensor, "fake_mode", None) for tensor in operands.values()}
    mode = modes.pop() if len(modes) == 1 else None
    if mode is None:
        mode = fake_mode_for(operands.values())
        operands = {name: as_fake(tensor, mode) for name, tensor in operands.items()}

    def operand(name: str, _: Operand) -> Tensor:
        return operands[name]

    args, kwargs = call_of(site, operand)
    with torch.no_grad(), mode:
        given = site.op.target(*args, **kwargs)
    return given if site.op.several else (given,)


def as_fake(tensor: Tensor, mode: Any) -> Tensor:
    """A fake in memory of its own, with the tensor's shape, dtype, device and strides."""
    with mode, torch.no_grad():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def fake_mode_for(tensors: Iterable[Tensor | None]) -> Any:
    """A new mode that knows the symbols in the tensors' sizes."""
    sizes = (size for tensor in tensors if tensor is not None for size in (*tensor.shape, *tensor.stride()))
    symbol = next((size for size in sizes if isinstance(size, torch.SymInt)), None)
    return FakeTensorMode(shape_env=None if symbol is None else symbol.node.shape_env)
