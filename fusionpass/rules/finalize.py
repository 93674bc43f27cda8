"""The rule out = sum_k weights[t, k] * y[inverse[t, k]], the end of a sparse layer without a gate, and what it grows over.

It is a routed sum only where the weights come from a top-k, rows through an inverse permutation, or rows from products with
the weights of chosen experts. Recurrences of linear attention are weighted sums too, and stay as they are:
`state + (v * k.unsqueeze(-1)).sum(-2)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.fx import Node

from fusionpass.graph.effects import Effects
from fusionpass.graph.identity import torch_name
from fusionpass.graph.nodes import (
    behind_views,
    gather_of,
    is_cast,
    is_reshape,
    is_view,
    pointwise_or_reduction,
    readers,
)
from fusionpass.graph.refusal import Refusal
from fusionpass.graph.tensors import known_equal, tensor_of
from fusionpass.graph.vocabulary import Vocabulary
from fusionpass.kernels.contract import MOST_COLUMNS, MOST_TOP_K
from fusionpass.rules import guards
from fusionpass.rules.cost import PRODUCTS, saved_finalize
from fusionpass.rules.rule import Reading, Rule
from fusionpass.rules.site import Site
from fusionpass.rules.stages import common, post_norm, residual, rms_norm, shared_add
from fusionpass.rules.weighted_sum import WeightedSum, fitted, weighted_sum, with_wide_weights

CODES = guards.CODES | {
    "top-k": "the number of terms is not a fixed number within the limit",
    "hidden-size": common.CODES["hidden-size"],
    "shape": "y, weights or inverse do not have the shape that the formula needs, or are not known to",
    "dtype": common.CODES["dtype"],
}
# Our ops that may stand for such a sum's reader, and which of their arguments is `a`.
_OPS = torch.ops.fusionpass
A_AT = {
    op.default: [argument.name for argument in op.default._schema.arguments].index("a")
    for op in (_OPS.gated_add, _OPS.gate_projected_add, _OPS.moe_combine)
}
# How far a router's weights may be from their top-k: scores, gather, renormalise, scale, casts and views in between.
REACH = 32


def find(words: Vocabulary, total: Node) -> Iterator[Reading]:
    found = weighted_sum(total, words)
    if isinstance(found, Refusal) or not is_routed(found) or _taken_over(total):
        return
    checked = fitted(found, total, total)
    if isinstance(checked, Refusal):
        if _from_top_k(found.weights):  # else a weighted sum of rows from elsewhere, an embedding's say
            yield _site(found, total), checked
        return
    wide = with_wide_weights(checked, total)
    if wide is not None:
        yield _site(wide, total), None
    yield _site(checked, total), None


def _site(found: WeightedSum, total: Node) -> Site:
    return Site(anchor=total, operands=found.operands(), parts=found.parts, numbers=found.numbers())


def is_routed(found: WeightedSum) -> bool:
    """Whether rows come through an inverse permutation, a top-k made the weights, or chosen experts made the rows."""
    return found.inverse is not None or _from_top_k(found.weights) or _of_chosen_experts(found.y)


def _from_top_k(weights: Node) -> bool:
    """Whether a top-k stands behind them, with nothing in between but what a router does to as many numbers.

    The hidden state that a router reads comes from top-ks too, those of the layers before. But a matrix product stands in
    front of it.
    """
    return any(torch_name(node) == "topk" for node in _behind(weights))


def _of_chosen_experts(rows: Node) -> bool:
    """Whether a product makes them with one matrix per row, gathered by row, with nothing in between but as many numbers.

    Some routers choose without a top-k: by two maxima (phimoe), or among scores of which shared experts have a part.
    """
    return any(any(map(_chosen, node.all_input_nodes)) for node in _behind(rows) if torch_name(node) in PRODUCTS)


def _chosen(weights: Node) -> bool:
    gathered = gather_of(behind_views(weights))
    matrices = None if gathered is None else tensor_of(gathered[0])
    return matrices is not None and matrices.dim() == 3


def _behind(value: Node) -> Iterator[Node]:
    """The nodes that a value comes from, as far as each has as many numbers and does no more than a router does."""
    count = tensor_of(value).numel() if tensor_of(value) is not None else None
    seen, to_see = set(), [value]
    while to_see and len(seen) < REACH:
        node = to_see.pop()
        if node in seen:
            continue
        seen.add(node)
        if torch_name(node) == "topk":  # its values are as many, itself it is two tensors
            yield node
            continue
        numbers = tensor_of(node)
        if numbers is not None and not known_equal(numbers.numel(), count):
            continue
        yield node
        if node is value or _routers(node):
            to_see += node.all_input_nodes


def _routers(node: Node) -> bool:
    """Whether a router may do so with its weights: not a product with a matrix, say."""
    name = torch_name(node)
    if is_view(node) or is_cast(node) or gather_of(node) is not None or name in ("getitem", "gather", "take_along_dim"):
        return True
    return pointwise_or_reduction(name)


def _taken_over(total: Node) -> bool:
    """Whether one of our ops reads it as its `a`: another rule's site, which has said why it does not compute it."""
    node = total
    while True:
        found = readers(node)
        if any(_read_as_a(each, node) for each in found):
            return True
        if len(found) != 1 or not (is_reshape(found[0]) or is_cast(found[0])):
            return False
        node = found[0]


def _read_as_a(op: Node, node: Node) -> bool:
    position = A_AT.get(op.target)
    return position is not None and op.args[position] is node


def hidden_size(site: Site, effects: Effects) -> Refusal | None:
    return common.hidden_size(site)


def known_dtype(site: Site, effects: Effects) -> Refusal | None:
    return common.kinds(site.anchor, [("the sum", tensor_of(site.anchor))])


RULE = Rule(
    name="finalize",
    formula="(weights[..., None] * y[inverse].view(*weights.shape, -1)).sum(-2)",
    needs=(
        "weights that come from a top-k, rows through an inverse permutation, or rows made by chosen experts' weights",
        "a sum over the last dim but one of a product with one weight per row",
        "views that keep the rows' order, and at most one gather of rows, in between",
        f"at most {MOST_TOP_K} terms and {MOST_COLUMNS} columns",
        "no gated add that takes it",
    ),
    codes=CODES,
    op=replace(common.MOE_COMBINE, contiguous=False),  # the shape of the sum is asked of the op: nothing else fixes it
    anchors=("sum", "einsum"),
    find=find,
    guards=(*guards.GUARDS[:1], guards.device_has_kernels, hidden_size, known_dtype, *guards.GUARDS[1:]),
    stages=(shared_add.STAGE, post_norm.STAGE, residual.STAGE, rms_norm.STAGE),
    saves=saved_finalize,
    absent="no weighted sum over the experts that a top-k chose",
)
