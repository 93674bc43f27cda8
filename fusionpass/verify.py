"""The op in place of the nodes must give a result of the same shape, dtype, device and strides, in memory of its own.

Later nodes may depend on any of these: `.view` raises on other strides, Inductor asserts them. Asked of the op's own fake
kernel, not assumed; where every operand is contiguous the answer is known unasked (one fake call takes 0.2 ms).
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fusionpass.match import Projection, Refusal, Site
from fusionpass.tensors import known_contiguous, same_sizes, same_strides, tensor_of


def same_result(site: Site, projection: Projection | None = None) -> Refusal | None:
    """None when the op gives what the sum gives, as far as a tensor's metadata goes."""
    a, gate, b, total = tensor_of(site.a), *_viewed(site), tensor_of(site.add)
    if all(map(known_contiguous, (a, gate, b, total))):
        return None
    with torch.no_grad(), total.fake_mode if hasattr(total, "fake_mode") else torch.no_grad():
        given = _result(a, gate, b, total.dtype, projection)
    if not same_sizes(given.shape, total.shape) or given.dtype != total.dtype or given.device != total.device:
        return Refusal("result", "the op would give {}, eager gives {}", given, total)
    if not same_strides(given, total):
        strides = tuple(given.stride()), tuple(total.stride())
        return Refusal("stride", "the op would give strides {}, eager gives {}", *strides)
    return None


def _viewed(site: Site) -> tuple[torch.Tensor, torch.Tensor]:
    """The gate and b in the shapes in which the formula sees them."""
    shaped = []
    for node, shape in ((site.gate, site.gate_shape), (site.b, site.b_shape)):
        value = tensor_of(node)
        if shape is not None and not same_sizes(value.shape, shape):
            with torch.no_grad(), value.fake_mode if hasattr(value, "fake_mode") else torch.no_grad():
                value = value.reshape(shape)
        shaped.append(value)
    return shaped[0], shaped[1]


def _result(
    a: torch.Tensor, gate: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, projection: Projection | None
) -> torch.Tensor:
    options = {} if a.dtype == gate.dtype == b.dtype == dtype else {"dtype": dtype}
    parts = () if projection is None else (projection.x, projection.weight, projection.bias)
    if projection is None or any(isinstance(part, str) for part in parts):
        return torch.ops.fusionpass.gated_add(a, gate, b, **options)
    x, weight, bias = (tensor_of(part) if isinstance(part, Node) else None for part in parts)
    return torch.ops.fusionpass.gate_projected_add(x, weight, bias, a, b, **options)
