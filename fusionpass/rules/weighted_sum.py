"""How a value is the weighted top-k sum of the experts' outputs, sum_k weights[t, k] * y[inverse[t, k]], in any spelling.

    weighted = y * weights.unsqueeze(-1)                     y [T * K, H]
    a = weighted[inverse].view(T, K, H).sum(dim=1)           the gather before or after the weights, or none at all
    y = y.masked_fill(mask, 0)                               one flag per row of y: the slots of experts elsewhere
    a = einsum("tk,tkh->th", weights, y)                     y [T, K, H]
    weights = weights.to(y.dtype)                            from float32, which the kernel takes as it is

Views that keep the rows' order may stand between.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from fusionpass.graph.naming import describe
from fusionpass.graph.nodes import gather_of, is_cast, is_reshape, readers
from fusionpass.graph.refusal import Refusal
from fusionpass.graph.tensors import dtype_text, fixed, known_contiguous, known_equal, same_sizes, shape_text, tensor_of
from fusionpass.graph.vocabulary import Vocabulary
from fusionpass.kernels.contract import MOST_TOP_K
from fusionpass.rules.site import Operand
from fusionpass.rules.stages import common


@dataclass(frozen=True)
class WeightedSum:
    """A value as the sum over k of weights[t, k] * y[inverse[t, k]]."""

    y: Node  # the experts' outputs, T * top_k rows
    weights: Node
    top_k: int
    inverse: Node | None
    permuted: bool  # the weights lie in the order of y, not of the sum
    masked: Node | None  # rows of y that count as zero
    parts: list[Node]  # its nodes, in the order of the data flow

    def operands(self) -> dict[str, Operand]:
        """What the op reads, each with the node that reads it now: for y and the weights the product or the gather, for the
        inverse the gather."""
        found = {"a": Operand(self.y, self._reader(self.y), "y"), "topk_weights": self._where_read(self.weights)}
        if self.inverse is not None:
            found["inverse"] = Operand(self.inverse, self._reader(self.inverse))
        if self.masked is not None:
            found["masked"] = self._where_read(self.masked)
        return found

    def numbers(self) -> dict[str, Any]:
        return {"top_k": self.top_k, "permuted": self.permuted}

    def _reader(self, node: Node) -> Node:
        return next(part for part in self.parts if node in part.all_input_nodes)

    def _where_read(self, bare: Node) -> Operand:
        """Where the bare weights, or the mask, are read. A reshape between them and the product may be a copy."""
        for part in self.parts:
            for operand in part.all_input_nodes:
                chain = [part]
                while operand is not bare and is_reshape(operand) and isinstance(operand.args[0], Node):
                    chain.append(operand)
                    operand = operand.args[0]
                if operand is bare:
                    return Operand(bare, chain[-1])
        return Operand(bare, self.parts[0])


class Rows(NamedTuple):
    """The outputs as the experts wrote them, and the nodes from there to the reader, in data-flow order."""

    y: Node
    nodes: list[Node]
    inverse: Node | None = None
    masked: Node | None = None


def weighted_sum(value: Node, words: Vocabulary) -> WeightedSum | Refusal:
    """The value, read as such a sum; or why it is none."""
    total, after = common.behind(value, casts=True)
    einsum = _einsum(total, words)
    if einsum is not None:
        weights, y = einsum
        rows = _rows(y, total, words)
        parts = [*rows.nodes, total, *after]
        return WeightedSum(rows.y, _bare(weights), tensor_of(y).shape[1], rows.inverse, False, rows.masked, parts)
    meaning = words.meaning(total)
    source = tensor_of(meaning.operands[0]) if meaning and meaning.op == "sum" else None
    if source is None or meaning.oddity is not None:
        other = Refusal("not-a-finalize", "a comes from {}", describe(total, words))
        return other if meaning is None or meaning.oddity is None else meaning.oddity
    if source.dim() < 3 or not words.reduces(total, source.dim() - 2, keepdim=False):
        return Refusal("not-a-finalize", "{} does not sum over the last dim but one of {}", total, shape_text(source))
    top_k = source.shape[-2]
    node, between = common.behind(meaning.operands[0])
    gather = gather_of(node)
    if gather is not None:
        gathered = node
        node, views = common.behind(gather[0])
        between = [*views, gathered, *between]
    product = words.meaning(node)
    if product is None or product.op != "mul" or product.in_place or product.oddity or len(product.operands) != 2:
        return Refusal("not-a-finalize", "{} sums up {}, not a product with weights", total, describe(node, words))
    for weights, y in (product.operands, product.operands[::-1]):
        if _one_per_row(weights, y):
            rows = _rows(y, node, words, gathered=gather is not None)
            inverse = rows.inverse if gather is None else gather[1]
            parts = [*rows.nodes, node, *between, total, *after]
            return WeightedSum(rows.y, _bare(weights), top_k, inverse, gather is not None, rows.masked, parts)
    return Refusal("not-a-finalize", "{} does not multiply by one weight per row", node)


def _rows(y: Node, reader: Node, words: Vocabulary, *, gathered: bool = False) -> Rows:
    """The rows that end in y, which the reader multiplies by the weights.

    gathered: rows are gathered after that.
    """
    y, widened = _narrow(y, reader)
    reader = widened[0] if widened else reader
    inverse, gather = None, []
    if not gathered:
        source, views = common.behind(y)
        found = gather_of(source)
        if found is not None and all(len(readers(part)) == 1 for part in (source, *views)):
            (y, inverse), gather = found, [source, *views]
            reader = source
    y, masked, fill = _unmasked(y, reader, words)
    return Rows(y, [*fill, *gather, *widened], inverse, masked)


def _unmasked(y: Node, reader: Node, words: Vocabulary) -> tuple[Node, Node | None, list[Node]]:
    """y before its masked rows were filled with zeros, the mask of the rows, and the nodes that fill. (The op fills
    them too.)"""
    source, mask, value = words.plain(y, "masked_fill") or (None, None, None)
    if type(value) not in (int, float) or value != 0 or readers(y) != [reader] or not _one_per_row(mask, y):
        return y, None, []
    if tensor_of(mask).dtype != torch.bool or tensor_of(source) is None:
        return y, None, []
    if not same_sizes(tensor_of(source).shape, tensor_of(y).shape):
        return y, None, []
    return source, _bare(mask), [y]


def _narrow(y: Node, reader: Node) -> tuple[Node, list[Node]]:
    """y before it was widened to float32, and the nodes from there on. Widening is exact, and the op does it by itself."""
    cast, views = common.behind(y)
    chain = [cast, *views]
    private = all(readers(part) == [after] for part, after in zip(chain, [*views, reader], strict=True))
    if private and is_cast(cast) and isinstance(cast.args[0], Node):
        before, after = tensor_of(cast.args[0]), tensor_of(cast)
        if before is not None and before.dtype in (torch.bfloat16, torch.float16) and after.dtype is torch.float32:
            return cast.args[0], chain
    return y, []


def _one_per_row(weights: object, y: object) -> bool:
    w, v = tensor_of(weights), tensor_of(y)
    if w is None or v is None or w.dim() != v.dim() or w.dim() < 2:
        return False
    return known_equal(w.shape[-1], 1) and same_sizes(w.shape[:-1], v.shape[:-1])


def _bare(weights: Node) -> Node:
    """The weights without the views that made a column of them. The op reads them in row-major order anyway."""
    while is_reshape(weights) and isinstance(weights.args[0], Node):
        before = tensor_of(weights.args[0])
        if before is None or before.dtype != tensor_of(weights).dtype:
            break
        weights = weights.args[0]
    return weights


def _einsum(node: Node, words: Vocabulary) -> tuple[Node, Node] | None:
    """(weights, y) of `einsum("tk,tkh->th", weights, y)`, for any letters and either order of the two."""
    found = words.einsum(node)
    if found is None:
        return None
    equation, operands = found
    terms, arrow, result = equation.replace(" ", "").partition("->")
    terms = terms.split(",")
    if not arrow or len(terms) != 2 or len(operands) != 2 or not all(term.isalpha() for term in terms):
        return None
    for (w, y), (weights, source) in ((terms, operands), (terms[::-1], operands[::-1])):
        if len(set(y)) == len(y) == 3 and w == y[:2] and result == y[0] + y[2] and tensor_of(source) is not None:
            return weights, source
    return None


def with_wide_weights(found: WeightedSum, total: Node) -> WeightedSum | None:
    """The sum with its weights as they were before a router rounded them to the dtype of `total`, where only this sum reads
    them: Inductor would give the cast of these T * K numbers a kernel of its own in every layer, since it fuses nothing into
    ours."""
    chain = [found.weights]
    while len(readers(chain[-1])) == 1 and readers(chain[-1])[0] not in found.parts:
        chain += readers(chain[-1])
    cast, dtype = chain[0], tensor_of(total).dtype
    if any(len(readers(node)) != 1 for node in chain) or not is_cast(cast) or not isinstance(cast.args[0], Node):
        return None
    before, after = tensor_of(cast.args[0]), tensor_of(cast)
    if before is None or (before.dtype, after.dtype) != (torch.float32, dtype) or before.dtype == dtype:
        return None
    return replace(found, weights=_bare(cast.args[0]), parts=[*chain, *found.parts])


def fitted(found: WeightedSum, summed: Node, total: Node) -> WeightedSum | Refusal:
    """The weighted sum that `summed` is, with its number of terms as a number, if all sizes and kinds fit a result of
    the shape and on the device of `total`."""
    a, y, weights, inverse, masked = (
        tensor_of(n) for n in (summed, found.y, found.weights, found.inverse, found.masked)
    )
    if y is None or weights is None or (found.inverse is not None and inverse is None):
        return Refusal("no-metadata", "y, weights or inverse of {} has no recorded tensor", summed)
    terms = fixed(found.top_k)
    if terms is None or not 1 <= terms <= MOST_TOP_K:
        return Refusal("top-k", "{} adds up {} terms: allowed are 1 to {}", summed, found.top_k, MOST_TOP_K)
    rows = 1
    for size in a.shape[:-1]:
        rows = rows * size
    sizes = {"y": (y, rows * terms * a.shape[-1]), "weights": (weights, rows * terms)}
    if inverse is not None:
        sizes["inverse"] = inverse, rows * terms
        if inverse.dtype not in (torch.int32, torch.int64):
            return Refusal("dtype", "the inverse permutation {} is {}", found.inverse, dtype_text(inverse.dtype))
    if masked is not None:
        sizes["the mask"] = masked, rows * terms
    for name, (tensor, size) in sizes.items():
        if not known_equal(tensor.numel(), size):
            return Refusal("shape", "{} is {}, a {} of {} terms", name, shape_text(tensor), shape_text(a), terms)
    if not known_equal(y.shape[-1], a.shape[-1]) or not (known_contiguous(a) and known_contiguous(tensor_of(total))):
        return Refusal("stride", "a is {} with strides {}", shape_text(a), tuple(a.stride()))
    # Eager takes indices from the CPU for rows on a GPU.
    whole = [(name, tensor) for name, tensor in (("inverse", inverse), ("the mask", masked)) if tensor is not None]
    return common.kinds(total, [("y", y), ("weights", weights)], whole) or replace(found, top_k=terms)
