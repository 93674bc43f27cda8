"""a = sum_k weights[t, k] * y[inverse[t, k]]: the weighted top-k sum of the experts' outputs is added up in the kernel.

    weighted = y * weights.unsqueeze(-1)                     y [T * K, H]
    a = weighted[inverse].view(T, K, H).sum(dim=1)           the gather before or after the weights, or none at all
    y = y.masked_fill(mask, 0)                               one flag per row of y: the slots of experts elsewhere
    a = einsum("tk,tkh->th", weights, y)                     y [T, K, H]
    weights = weights.to(y.dtype)                            from float32, which the kernel takes as it is

Views that keep the rows' order may stand between.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fusionpass.effects import Effects
from fusionpass.kernels.contract import MOST_COLUMNS, MOST_TOP_K
from fusionpass.match import Finalize, Refusal, RuleInfo, Site
from fusionpass.naming import describe
from fusionpass.nodes import gather_of, is_cast, is_reshape, readers
from fusionpass.options import Options
from fusionpass.stages import common
from fusionpass.tensors import dtype_text, fixed, known_contiguous, known_equal, same_sizes, shape_text, tensor_of
from fusionpass.vocabulary import Vocabulary

INFO = RuleInfo(
    name="finalize",
    kind="stage",
    formula="a = sum_k weights[t, k] * y[inverse[t, k]]",
    needs=(
        "a sum over the last dim but one of a product with one weight per row",
        "views that keep the rows' order, and at most one gather of rows, in between",
        f"at most {MOST_TOP_K} terms and {MOST_COLUMNS} columns",
        "y and weights in bfloat16, float16 or float32",
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
    reads = [("y", found.y, parts[0]), ("inverse", found.inverse, gather)]
    for name, node in (("topk_weights", found.weights), ("masked", found.masked)):
        reads.append((name, node, None if node is None else _first_reader(node, parts)))
    refusal = refusal or common.movable(reads, parts[0], site.add, effects)
    if refusal is None:
        _widen_weights(site, found, parts, effects)
        site.finalize = found
        site.parts[:0] = parts
        site.stages.insert(0, INFO.name)
    return refusal


def _weighted_sum(site: Site, words: Vocabulary, parts: list[Node]) -> Finalize | Refusal:
    """The stage's operands; `parts` gets its nodes, in the order of the data flow."""
    total = common.behind(site.a, parts, casts=True)
    other = Refusal("not-a-finalize", "a comes from {}", describe(total, words))
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
        return Refusal("not-a-finalize", "{} sums up {}, not a product with weights", total, describe(node, words))
    parts.insert(0, node)
    for weights, y in (product.operands, product.operands[::-1]):
        if _one_per_row(weights, y):
            if gather is None:
                return _gathered(y, weights, top_k, parts, words)
            y, masked = _unmasked(_narrow(y, parts), parts, words)
            return Finalize(y, _bare(weights), top_k, gather[1], True, masked)
    return Refusal("not-a-finalize", "{} multiplies by something else than one weight per row", node)


def _gathered(y: Node, weights: Node, top_k: object, parts: list[Node], words: Vocabulary) -> Finalize:
    """y as the experts wrote it, when rows are gathered before the weights are applied."""
    y = _narrow(y, parts)
    before: list[Node] = []
    source = common.behind(y, before)
    gather = gather_of(source)
    if gather is None or any(len(readers(part)) != 1 for part in (source, *before)):
        y, masked = _unmasked(y, parts, words)
        return Finalize(y, _bare(weights), top_k, None, False, masked)
    parts[:0] = [source, *before]
    y, masked = _unmasked(gather[0], parts, words)
    return Finalize(y, _bare(weights), top_k, gather[1], False, masked)


def _unmasked(y: Node, parts: list[Node], words: Vocabulary) -> tuple[Node, Node | None]:
    """y before its masked rows were filled with zeros, which the op does, and the mask of the rows."""
    source, mask, value = words.plain(y, "masked_fill") or (None, None, None)
    if type(value) not in (int, float) or value != 0 or readers(y) != parts[:1] or not _one_per_row(mask, y):
        return y, None
    if tensor_of(mask).dtype != torch.bool or tensor_of(source) is None:
        return y, None
    if not same_sizes(tensor_of(source).shape, tensor_of(y).shape):
        return y, None
    parts.insert(0, y)
    return source, _bare(mask)


def _narrow(y: Node, parts: list[Node]) -> Node:
    """y before it was widened to float32, which is exact and which the op does by itself."""
    views: list[Node] = []
    cast = common.behind(y, views)
    chain = [cast, *views]
    private = all(readers(part) == [reader] for part, reader in zip(chain, [*views, *parts[:1]], strict=True))
    if private and is_cast(cast) and isinstance(cast.args[0], Node):
        before, after = tensor_of(cast.args[0]), tensor_of(cast)
        if before is not None and before.dtype in (torch.bfloat16, torch.float16) and after.dtype is torch.float32:
            parts[:0] = chain
            return cast.args[0]
    return y


def _one_per_row(weights: object, y: object) -> bool:
    w, v = tensor_of(weights), tensor_of(y)
    if w is None or v is None or w.dim() != v.dim() or w.dim() < 2:
        return False
    return known_equal(w.shape[-1], 1) and same_sizes(w.shape[:-1], v.shape[:-1])


def _bare(weights: Node) -> Node:
    """The weights without the views that made a column of them: the op reads them in row-major order anyway."""
    while is_reshape(weights) and isinstance(weights.args[0], Node):
        before = tensor_of(weights.args[0])
        if before is None or before.dtype != tensor_of(weights).dtype:
            break
        weights = weights.args[0]
    return weights


def _widen_weights(site: Site, found: Finalize, parts: list[Node], effects: Effects) -> None:
    """Weights before a router rounded them to the dtype, where only this sum reads them and they can still be read: Inductor
    would give the cast of these T * K numbers a kernel of its own in every layer, since it fuses nothing into ours."""
    chain = [found.weights]
    while len(readers(chain[-1])) == 1 and readers(chain[-1])[0] not in parts:
        chain += readers(chain[-1])
    cast, total = chain[0], tensor_of(site.add)
    if any(len(readers(node)) != 1 for node in chain) or not is_cast(cast) or not isinstance(cast.args[0], Node):
        return
    before, after = tensor_of(cast.args[0]), tensor_of(cast)
    if before is None or (before.dtype, after.dtype) != (torch.float32, total.dtype) or before.dtype == total.dtype:
        return
    moved = [("topk_weights", cast.args[0], cast)]
    if common.kinds(site, [("weights", before)]) or common.movable(moved, cast, site.add, effects):
        return
    parts[:0] = chain
    found.weights = _bare(cast.args[0])


def _first_reader(bare: Node, parts: list[Node]) -> Node:
    """Where the bare weights, or mask, are read: a reshape between them and the product may be a copy."""
    for part in parts:
        for operand in part.all_input_nodes:
            chain = [part]
            while operand is not bare and is_reshape(operand) and isinstance(operand.args[0], Node):
                chain.append(operand)
                operand = operand.args[0]
            if operand is bare:
                return chain[-1]
    return parts[0]


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
    a, y, weights, inverse, masked = (
        tensor_of(n) for n in (site.a, found.y, found.weights, found.inverse, found.masked)
    )
    if y is None or weights is None or (found.inverse is not None and inverse is None):
        return Refusal("no-metadata", "y, weights or inverse of {} has no recorded tensor", site.a)
    terms = fixed(found.top_k)
    if terms is None or not 1 <= terms <= MOST_TOP_K:
        return Refusal("top-k", "{} adds up {} terms: allowed are 1 to {}", site.a, found.top_k, MOST_TOP_K)
    found.top_k = terms
    rows = 1
    for size in a.shape[:-1]:
        rows = rows * size
    sizes = {"y": (y, rows * found.top_k * a.shape[-1]), "weights": (weights, rows * found.top_k)}
    if inverse is not None:
        sizes["inverse"] = inverse, rows * found.top_k
        if inverse.dtype not in (torch.int32, torch.int64):
            return Refusal("dtype", "the inverse permutation {} is {}", found.inverse, dtype_text(inverse.dtype))
    if masked is not None:
        sizes["the mask"] = masked, rows * found.top_k
    for name, (tensor, size) in sizes.items():
        if not known_equal(tensor.numel(), size):
            return Refusal("shape", "{} is {}, a {} of {} terms", name, shape_text(tensor), shape_text(a), found.top_k)
    if not known_equal(y.shape[-1], a.shape[-1]) or not (known_contiguous(a) and known_contiguous(tensor_of(site.add))):
        return Refusal("stride", "a is {} with strides {}", shape_text(a), tuple(a.stride()))
    # Eager takes indices from the CPU for rows on a GPU.
    whole = [(name, tensor) for name, tensor in (("inverse", inverse), ("the mask", masked)) if tensor is not None]
    return common.kinds(site, [("y", y), ("weights", weights)], whole)
