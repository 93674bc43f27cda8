"""Kernels and bytes of a site, before and after: what eager, or Inductor, launches and moves, counted from shapes.

In eager each arithmetic node is one kernel. It reads its tensor operands once and writes its result once. Views, and casts
that return their input, cost nothing. Inductor makes one kernel of all nodes that are not matrix products. But a
reduction over the terms of a weighted sum and a reduction over a row do not share a kernel. A library's matrix product
counts as one kernel. Caches are not modelled, so for small tensors the bytes are upper bounds.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fusionpass.graph.identity import torch_name
from fusionpass.graph.nodes import gather_of, is_cast, is_view, pointwise_or_reduction
from fusionpass.graph.tensors import tensor_of
from fusionpass.graph.vocabulary import Vocabulary
from fusionpass.operators.implementations import interpreted
from fusionpass.rules.site import Site

ROWWISE = ("mean", "rms_norm")  # operations that reduce each row of the result
UNROLLED = 8  # Inductor writes out a sum of fewer terms, so that it is no reduction


def counted_against(inner: object) -> str:
    """Whose kernels a site is compared with: those of an inner compiler that fuses, else eager's."""
    return "inductor" if inner == "inductor" else "eager"


def unfused(site: Site, words: Vocabulary, inner: object, tuned: bool) -> tuple[int, int | None]:
    """How many kernels the site's nodes are without the pass, and how many bytes these move (None if a size is not known).

    tuned: Inductor tunes by coordinate descent.
    """
    if counted_against(inner) == "eager":
        return kernels_and_bytes(site.parts, words)
    between = _between(site, words, tuned)
    moved = [fused_bytes(site, words), *(bytes_of(tensor_of(node)) for node in between * 2)]  # each is written and read
    return 1 + len(between), None if None in moved else sum(moved)


def fused(site: Site, words: Vocabulary, inner: object, tuned: bool) -> tuple[int, int | None]:
    """The same for what takes their place: one kernel, except on a CPU under Inductor, which gets the plain expression."""
    opened = (site.op.opened or site.op.opened_on_cpu) and _on_cpu(site) and not interpreted()
    if counted_against(inner) == "eager" or not opened:
        moved = fused_bytes(site, words)
        if site.written_back is None:
            return 1, moved
        copied = bytes_of(tensor_of(site.end))  # the sum is read once more and written into the residual
        return 2, None if None in (moved, copied) else moved + 2 * copied
    kernels, moved = unfused(site, words, inner, tuned)
    operands = [site.operands[name].value for name in site.op.widened if name in site.operands]
    tensors = [words.tensor(operand) for operand in operands]
    casts = [tensor for tensor in tensors if tensor.dtype != torch.float32]  # the expression's product is in float32
    wide = [None if bytes_of(tensor) is None else bytes_of(tensor) * 4 // tensor.element_size() for tensor in casts]
    return kernels + len(casts), None if None in (moved, *wide) else moved + 2 * sum(wide)


def kept(nodes: list[Node], words: Vocabulary, inner: object) -> tuple[int, int | None]:
    """The same for nodes that stay because of other readers."""
    kernels, moved = kernels_and_bytes(nodes, words)
    if counted_against(inner) == "inductor":
        launching = [node for node in nodes if _launches(node, words)]
        products = [node for node in launching if _is_product(node, words)]
        kernels = len(products) + (len(launching) > len(products))
    return kernels, moved


def _between(site: Site, words: Vocabulary, tuned: bool) -> list[Node]:
    """What one of Inductor's kernels writes for the next: the result of a matrix product, and a sum that a norm reads.

    If Inductor tunes by coordinate descent, the product of the gate becomes a reduction over a row, like the norm, unless it
    adds a bias. An einsum then becomes a reduction over its terms; on a CPU it always does. On a CPU a reduction's
    loops nest in the loops of its reader, if the reader goes over the row once more.
    """
    on_cpu = _on_cpu(site)
    products = [node for node in site.parts if _is_product(node, words)]
    einsums = [node for node in products if words.einsum(node) is not None]
    between, rowwise = [], [node for node in site.parts if words.operation(node) in ROWWISE]
    for node in products:
        if node in einsums:
            reduced = tuned or on_cpu
        else:
            reduced = tuned and not on_cpu and not _adds_a_bias(node, words)
            rowwise += [node] if reduced else []
        between += [] if reduced else [node]
    many = site.numbers.get("top_k", 0) >= UNROLLED and not set(einsums) & set(between)
    if many and bool(rowwise) != on_cpu:
        between.append(site.end)
    return between


def _adds_a_bias(product: Node, words: Vocabulary) -> bool:
    meaning = words.meaning(product)
    return meaning.op == "addmm" or (meaning.op == "linear" and meaning.operands[2] is not None)


def _on_cpu(site: Site) -> bool:
    return tensor_of(site.end).device.type == "cpu"


def _is_product(node: Node, words: Vocabulary) -> bool:
    return words.operation(node) in ("linear", "matmul", "addmm") or words.einsum(node) is not None


def kernels_and_bytes(nodes: list[Node], words: Vocabulary) -> tuple[int, int | None]:
    """How many kernels the nodes launch in eager, and how many bytes these move (None if a size is not known)."""
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
    if words.operation(node) is not None or gather_of(node) is not None or words.einsum(node) is not None:
        return True
    return not is_view(node) and pointwise_or_reduction(torch_name(node))


def fused_bytes(site: Site, words: Vocabulary) -> int | None:
    """Bytes the one op reads and writes."""
    read = [words.tensor(operand.value) for operand in site.operands.values()]
    moved = [bytes_of(tensor) for tensor in (*read, *map(tensor_of, site.results))]
    return None if None in moved else sum(moved)


def bytes_of(tensor: torch.Tensor | None) -> int | None:
    """Size of a fake tensor in bytes, 0 for anything else. A symbolic size counts as the value at the tracing."""
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
