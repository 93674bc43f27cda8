"""a = sum_k weights[t, k] * y[inverse[t, k]]: the weighted top-k sum of the experts' outputs is added up in the kernel.

    weighted = y * weights.unsqueeze(-1)                     y [T * K, H]
    a = weighted[inverse].view(T, K, H).sum(dim=1)           the gather before or after the weights, or none at all
    a = einsum("tk,tkh->th", weights, y)                     y [T, K, H]
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fusionpass.effects import Effects
from fusionpass.kernels.contract import MOST_COLUMNS, MOST_TOP_K
from fusionpass.match import Finalize, Refusal, RuleInfo, Site
from fusionpass.options import Options
from fusionpass.stages import common
from fusionpass.tensors import dtype_text, known_contiguous, known_equal, same_sizes, shape_text, tensor_of
from fusionpass.vocabulary import Vocabulary, gather_of, is_reshape

INFO = RuleInfo(
    name="finalize",
    kind="stage",
    formula="a = sum_k weights[t, k] * y[inverse[t, k]]",
    needs=(
        "a sum over the last dim but one of a product with one weight per row",
        "views that keep the rows' order, and at most one gather of rows, in between",
        f"at most {MOST_TOP_K} terms and {MOST_COLUMNS} columns",
        "y in the dtype of a; weights in it or float32",
    ),
    codes=common.CODES
    | {
        "not-a-finalize": "a is computed by something else",
        "used-elsewhere": "a node of the weighted sum has other readers, so it must stay",
        "top-k": "the number of terms is not a fixed number within the limit",
    },
)


def grow(site: Site, words: Vocabulary, effects: Effects, options: Options) -> Refusal | None:
    """Absorb the weighted sum into the site; the reason when it stays outside, and then the site is unchanged."""
    refusal = common.combinable(site, options)
    if refusal is not None:
        return refusal
    parts: list[Node] = []
    found = _weighted_sum(site, words, parts)
    if isinstance(found, Refusal):
        return found
    refusal = common.read_once(parts, site.add) or _shapes(site, found)
    # y and the weights are read where they are multiplied or gathered, the inverse where it gathers.
    gather = next((part for part in parts if found.inverse in part.all_input_nodes), None)
    weighing = next(part for part in parts if found.weights in _roots(part))
    reads = [("y", found.y, parts[0]), ("topk_weights", found.weights, weighing), ("inverse", found.inverse, gather)]
    refusal = refusal or common.movable(reads, parts[0], site.add, effects)
    if refusal is None:
        site.finalize = found
        site.parts[:0] = parts
        site.stages.insert(0, INFO.name)
    return refusal


def _weighted_sum(site: Site, words: Vocabulary, parts: list[Node]) -> Finalize | Refusal:
    """The stage's operands; `parts` gets its nodes, in the order of the data flow."""
    total = common.behind(site.a, parts, casts=True)
    other = Refusal("not-a-finalize", "a comes from {}", total)
    einsum = _einsum(total, words)
    if einsum is not None:
        parts.insert(0, total)
        weights, y = einsum
        return _gathered(y, weights, tensor_of(y).shape[1], parts, words)
    meaning = words.meaning(total)
    source = tensor_of(meaning.operands[0]) if meaning and meaning.op == "sum" else None
    if source is None or meaning.oddity is not None:
        return other if meaning is None or meaning.oddity is None else meaning.oddity
    if source.dim() < 3 or not words.reduces(total, source.dim() - 2, keepdim=False):
        return Refusal("not-a-finalize", "{} sums other dims than the last but one of {}", total, shape_text(source))
    parts.insert(0, total)
    top_k = source.shape[-2]
    node = common.behind(meaning.operands[0], parts)
    gather = gather_of(node)
    if gather is not None:
        parts.insert(0, node)
        node = common.behind(gather[0], parts)
    product = words.meaning(node)
    if product is None or product.op != "mul" or product.in_place or product.oddity or len(product.operands) != 2:
        return Refusal("not-a-finalize", "{} sums up {}, which is no product with weights", total, node)
    parts.insert(0, node)
    for weights, y in (product.operands, product.operands[::-1]):
        if _one_per_row(weights, y):
            if gather is not None:
                return Finalize(y, _bare(weights), top_k, gather[1], permuted=True)
            return _gathered(y, weights, top_k, parts, words)
    return Refusal("not-a-finalize", "{} multiplies by something else than one weight per row", node)


def _gathered(y: Node, weights: Node, top_k: object, parts: list[Node], words: Vocabulary) -> Finalize:
    """y as the experts wrote it, when rows are gathered before the weights are applied."""
    before: list[Node] = []
    source = common.behind(y, before)
    gather = gather_of(source)
    if gather is None or len(source.users) != 1 or any(len(part.users) != 1 for part in before):
        return Finalize(y, _bare(weights), top_k, None, permuted=False)
    parts[:0] = [source, *before]
    return Finalize(gather[0], _bare(weights), top_k, gather[1], permuted=False)


def _one_per_row(weights: object, y: object) -> bool:
    w, v = tensor_of(weights), tensor_of(y)
    if w is None or v is None or w.dim() != v.dim() or w.dim() < 2:
        return False
    return known_equal(w.shape[-1], 1) and same_sizes(w.shape[:-1], v.shape[:-1])


def _bare(weights: Node) -> Node:
    """The weights without the views that made a column of them: the op reads them in row-major order anyway."""
    while is_reshape(weights) and isinstance(weights.args[0], Node) and tensor_of(weights.args[0]) is not None:
        weights = weights.args[0]
    return weights


def _roots(part: Node) -> list[Node]:
    """The part's operands and what they are views of."""
    return [node for operand in part.all_input_nodes for node in (operand, _bare(operand))]


def _einsum(node: Node, words: Vocabulary) -> tuple[Node, Node] | None:
    """(weights, y) of `einsum("tk,tkh->th", weights, y)`, whatever its letters and the order of the two."""
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


def _shapes(site: Site, found: Finalize) -> Refusal | None:
    a, y, weights, inverse = (tensor_of(n) for n in (site.a, found.y, found.weights, found.inverse))
    if y is None or weights is None or (found.inverse is not None and inverse is None):
        return Refusal("no-metadata", "y, weights or inverse of {} has no recorded tensor", site.a)
    if not isinstance(found.top_k, int) or not 1 <= found.top_k <= MOST_TOP_K:
        return Refusal("top-k", "{} adds up {} terms: allowed are 1 to {}", site.a, found.top_k, MOST_TOP_K)
    rows = 1
    for size in a.shape[:-1]:
        rows = rows * size
    sizes = {"y": (y, rows * found.top_k * a.shape[-1]), "weights": (weights, rows * found.top_k)}
    if inverse is not None:
        sizes["inverse"] = inverse, rows * found.top_k
        if inverse.dtype not in (torch.int32, torch.int64):
            return Refusal("dtype", "the inverse permutation {} is {}", found.inverse, dtype_text(inverse.dtype))
    for name, (tensor, size) in sizes.items():
        if not known_equal(tensor.numel(), size):
            return Refusal("shape", "{} is {}, a {} of {} terms", name, shape_text(tensor), shape_text(a), found.top_k)
    if not known_equal(y.shape[-1], a.shape[-1]) or not (known_contiguous(a) and known_contiguous(tensor_of(site.add))):
        return Refusal("stride", "a is {} with strides {}", shape_text(a), tuple(a.stride()))
    return common.kinds(site, [("y", y)], wider=[("weights", weights)])
