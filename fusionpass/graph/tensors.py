"""What the tracer recorded of a node's value, read without installing guards.

A size may be symbolic. A plain `==` on it inside a backend makes Dynamo guard on the answer and recompile for the next
size: 3 compiles instead of 1 for three values of T. So every comparison here uses `statically_known_true`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fusionpass.kernels.contract import listed
from fusionpass.private import FakeTensor

# The type of an nn.Buffer is Tensor. UninitializedParameter and all other types have rules of their own.
PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter, FakeTensor)


def value_of(node: Node) -> Any:
    """The fake value: "val" from AOT, export and make_fx, "example_value" from Dynamo; None when there is none."""
    meta = node.meta
    return meta["val"] if "val" in meta else meta.get("example_value")


def attribute(owner: torch.nn.Module, path: str) -> Any:
    """What a `get_attr` node gets, None where there is nothing."""
    value: Any = owner
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def tensor_of(node: object) -> torch.Tensor | None:
    """The node's fake tensor, or None when the value is no tensor or was not recorded."""
    value = value_of(node) if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def settled(argument: Any) -> Any:
    """An argument of a call, in which recorded numbers take the place of nodes: in a graph of `symbolic_trace` sizes
    and dims are nodes. A node that holds a tensor, or has no recorded value, stays."""
    if isinstance(argument, Node):
        value = value_of(argument)
        return argument if value is None or isinstance(value, torch.Tensor) else settled(value)
    if isinstance(argument, (list, tuple)):
        return tuple(map(settled, argument))
    return argument


def known_equal(left: Any, right: Any) -> bool:
    """True only if the two sizes are equal for every input that the graph admits."""
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    return statically_known_true(left == right)


def fixed(size: Any) -> int | None:
    """The size as a number; None if the graph admits inputs of other sizes."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def same_sizes(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return len(left) == len(right) and all(map(known_equal, left, right))


def broadcasts_to(shape: Sequence[Any], target: Sequence[Any]) -> bool:
    """Whether `shape` is known to broadcast to exactly `target`."""
    if len(shape) > len(target):
        return False
    tail = target[len(target) - len(shape) :]
    return all(known_equal(size, 1) or known_equal(size, wanted) for size, wanted in zip(shape, tail, strict=True))


def same_strides(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether the strides are equal where they matter. The stride of a dimension of size 1 does not matter."""
    strides = zip(left.shape, left.stride(), right.stride(), strict=True)
    return all(known_equal(size, 1) or known_equal(x, y) for size, x, y in strides)


def known_contiguous(tensor: torch.Tensor) -> bool:
    expected: Any = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if not known_equal(size, 1) and not known_equal(stride, expected):
            return False
        expected = expected * size
    return True


def under_autocast(device: torch.device) -> bool:
    """Whether autocast is on around the pass for the ops of a device. Some devices have no autocast."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def shape_text(tensor: torch.Tensor) -> str:
    return listed(tensor.shape)


def dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def storage_key(tensor: torch.Tensor) -> int | None:
    """Identity of the memory behind a fake tensor: equal for views, aliases and in-place results of each other.

    None if the tensor has no storage (sparse, functorch wrappers).
    """
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def storage_keys(tensor: torch.Tensor) -> list[int]:
    """The `storage_key` of every tensor that a wrapper subclass (DTensor, a quantised weight) is made of."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return [key for name in names for key in storage_keys(getattr(tensor, name))]
    key = storage_key(tensor)
    return [] if key is None else [key]
