"""Kernels and bytes of a site, before and after: what eager launches and moves, counted from shapes.

Each arithmetic node is one kernel that reads its tensor operands once and writes its result once; views and casts that
return their input cost nothing. Caches are not modelled, so the numbers are upper bounds for small tensors.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fusionpass.match import Site
from fusionpass.nodes import gather_of, is_cast
from fusionpass.tensors import tensor_of
from fusionpass.vocabulary import Vocabulary


def kernels_and_bytes(nodes: list[Node], words: Vocabulary) -> tuple[int, int | None]:
    """How many kernels the nodes launch in eager and how many bytes those move; None when a size has no known value."""
    kernels, total = 0, 0
    for node in nodes:
        if not _launches(node, words):
            continue
        kernels += 1
        moved = [bytes_of(tensor_of(operand)) for operand in node.all_input_nodes]
        if node.op == "call_module":
            moved += [bytes_of(parameter) for parameter in words.module(node).parameters()]
        moved.append(bytes_of(tensor_of(node)))
        total = None if total is None or None in moved else total + sum(moved)
    return kernels, total


def _launches(node: Node, words: Vocabulary) -> bool:
    """Whether eager launches a kernel for the node."""
    if is_cast(node):
        before, after = tensor_of(node.all_input_nodes[0]), tensor_of(node)
        return before is None or after is None or before.dtype != after.dtype
    return words.operation(node) is not None or gather_of(node) is not None or words.einsum(node) is not None


def fused_bytes(site: Site, words: Vocabulary) -> int | None:
    """Bytes the one op reads and writes."""
    found, routed, norm = site.projection, site.finalize, site.norm
    read = [site.gate] if found is None else [found.x, found.weight, found.bias]
    read += [site.a] if routed is None else [routed.y, routed.weights, routed.inverse, routed.masked]
    if norm is not None:
        read += [norm.weight, norm.result]  # the weight read, the result written
    moved = [
        bytes_of(words.tensor(operand)) for operand in (site.b, site.residual, *read, site.end) if operand is not None
    ]
    return None if None in moved else sum(moved)


def bytes_of(tensor: torch.Tensor | None) -> int | None:
    """Size of a fake tensor in bytes, 0 for anything else; a symbolic size counts as the value it was traced with."""
    if tensor is None:
        return 0
    total = tensor.element_size()
    strides = tensor.stride() if tensor.layout is torch.strided else [1] * tensor.dim()
    for size, stride in zip(tensor.shape, strides, strict=True):
        if isinstance(stride, int) and stride == 0:  # expanded: the same bytes again
            continue
        if not isinstance(size, int):
            size = size.node.hint if size.node.has_hint() else None
            if size is None:
                return None
        total *= size
    return total
