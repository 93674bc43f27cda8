"""What a node does to the layout of a value, for every tracer: casts, views, gathers of rows, and who reads it."""

from __future__ import annotations

from functools import cache

import torch
from torch.fx import Node

from fusionpass.graph.identity import torch_name
from fusionpass.graph.tensors import known_equal, same_sizes, same_strides, storage_key, tensor_of

CASTS = frozenset("to type type_as float half bfloat16 double _to_copy convert_element_type".split())
# They reorder or drop nothing: if there is one value per row, the rows keep their order.
RESHAPES = frozenset(
    "view reshape view_as reshape_as _unsafe_view unsqueeze squeeze flatten unflatten alias contiguous".split()
)
EXPANDS = frozenset("expand expand_as broadcast_to".split())
VIEWS = (
    RESHAPES
    | EXPANDS
    | frozenset(
        "getitem select narrow chunk split tensor_split unbind slice transpose t permute movedim swapaxes swapdims "
        "detach clone ravel mT T".split()
    )
)

REDUCTIONS = frozenset(
    "sum mean amax amin var std prod softmax log_softmax layer_norm rms_norm group_norm norm".split()
)

# Python's operators that have another name in aten.
OPERATORS = {"truediv": "div", "floordiv": "floor_divide", "mod": "remainder", "invert": "bitwise_not"}


def is_cast(node: Node) -> bool:
    return torch_name(node) in CASTS


def is_view(node: Node) -> bool:
    return torch_name(node) in VIEWS


def is_expand(node: Node) -> bool:
    """Whether the node repeats its first operand along dims, as broadcasting would."""
    return torch_name(node) in EXPANDS


def is_reshape(node: Node) -> bool:
    """Whether the node has the elements of its first operand, in their order, in another shape."""
    return torch_name(node) in RESHAPES or _takes_all(node)


def _takes_all(node: Node) -> bool:
    """x[..., None], x[:] and the like: slices that leave nothing out. (Slices of tensors always run forward.)"""
    name = torch_name(node)
    if name not in ("getitem", "slice") or len(node.args) < 2:
        return False
    before, after = tensor_of(node.args[0]), tensor_of(node)
    if before is None or after is None or not known_equal(before.numel(), after.numel()):
        return False
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return name == "slice" or all(item is None or item is Ellipsis or isinstance(item, slice) for item in index)


def is_identity(node: Node) -> bool:
    """Whether a cast or view returns its input unchanged: `.to(same dtype)`, `.contiguous()` of a contiguous tensor."""
    before, after = tensor_of(node.args[0]), tensor_of(node)
    if before is None or after is None or before.dtype != after.dtype or before.dim() != after.dim():
        return False
    key = storage_key(before)
    return (
        torch_name(node) != "detach"  # the same memory, but no gradient
        and key is not None
        and key == storage_key(after)
        and same_sizes(before.shape, after.shape)
        and same_strides(before, after)
        and known_equal(before.storage_offset(), after.storage_offset())
    )


def is_metadata_assert(node: Node) -> bool:
    """Whether the node only checks dtype, device and layout of a tensor. torch.export puts one before each `.to`.

    What it checks is what the tracer recorded. So it is removed with its tensor, and does not count as a reader.
    """
    return node.target is torch.ops.aten._assert_tensor_metadata.default and not node.users


def readers(node: Node) -> list[Node]:
    """The users that read the node's value."""
    return [user for user in node.users if not is_metadata_assert(user)]


def gather_of(node: Node) -> tuple[Node, Node] | None:
    """(source, index) when the node takes rows of `source` by a tensor of integers: source[index], one index per row."""
    name = torch_name(node)
    if len(node.args) < 2 or node.kwargs:
        return None
    source, index = node.args[0], node.args[1]
    if name == "index_select" and len(node.args) == 3 and node.args[1] == 0:
        index = node.args[2]
    elif name == "index" and isinstance(index, (list, tuple)) and len(index) == 1:
        index = index[0]
    elif name != "getitem":
        return None
    positions = tensor_of(index)
    if positions is None or positions.dim() != 1 or positions.is_floating_point() or positions.dtype == torch.bool:
        return None
    return source, index


def behind_views(node: Node) -> Node:
    """The node that the views ending in `node` look at. A gather of rows is none of them."""
    while is_view(node) and gather_of(node) is None and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


@cache
def pointwise_or_reduction(name: str) -> bool:
    """Whether torch's operation of this name computes its elements one by one, or sums or compares rows of them."""
    name = name.strip("_")
    if name in REDUCTIONS:
        return True
    for spelled in (name, name.removeprefix("i"), name.removeprefix("r")):  # iadd, __radd__
        packet = getattr(torch.ops.aten, OPERATORS.get(spelled, spelled), None)
        if packet is not None and any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads()):
            return True
    return False
