"""normed = out * rsqrt(mean(out ** 2) + eps) * (offset + weight): the norm that the next layer begins with, a second result.

Its spellings are in `fusionpass.rules.norms`. The read of the sum moves to where the sum is made.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fusionpass.graph.effects import Effects
from fusionpass.graph.nodes import readers
from fusionpass.graph.refusal import Refusal
from fusionpass.graph.tensors import known_contiguous, tensor_of
from fusionpass.graph.vocabulary import Vocabulary
from fusionpass.rules import norms
from fusionpass.rules.moving import movable
from fusionpass.rules.norms import Norm, no_norm, norm_of, unfit
from fusionpass.rules.rule import Stage
from fusionpass.rules.site import Operand, Site
from fusionpass.rules.stages import common


def grow(site: Site, words: Vocabulary, effects: Effects) -> Site | Refusal:
    """The site with the norm, or why it stays outside."""
    refusal = common.combinable(site)
    if refusal is not None:
        return refusal
    end = site.end
    if not known_contiguous(tensor_of(end)):
        return Refusal("stride", "{} has strides {}", end, tuple(tensor_of(end).stride()))
    narrow = common.narrowed(end)
    kept = tensor_of(narrow or end).dtype
    norm = norm_of(end, kept, words, effects)
    writer = next((reader for reader in end.users if _writes_into(reader, end, words)), None)
    if norm is None and writer is not None:
        return Refusal("mutation-between", "{} writes the sum ({}) before others read it", writer, end)
    if norm is None:
        return no_norm(end, words)
    if isinstance(norm, Refusal):
        return norm
    if narrow is not None and not set(readers(end)) <= {narrow, *norm.parts}:
        narrow = None  # others read the wide sum, so the op gives the wide one
    refusal = _checked(site, norm, tensor_of(narrow or end), words, effects)
    if refusal is not None:
        return refusal
    weight = {} if norm.weight is None else {"norm_weight": Operand(norm.weight, norm.weight_read)}
    return site.grown(
        "rms_norm",
        after=[*([] if narrow is None else [narrow]), *norm.parts],
        operands=weight,
        numbers={"eps": norm.eps, "offset": norm.offset},
        results=[narrow or end, norm.result],
        op=common.MOE_COMBINE,
    )


def _checked(site: Site, norm: Norm, total: torch.Tensor, words: Vocabulary, effects: Effects) -> Refusal | None:
    """Why the op cannot compute the norm together with the sum, which it gives as `total`."""
    refusal, weight = unfit(norm, total, words), words.tensor(norm.weight)
    if refusal is not None:
        return refusal
    if weight is not None:
        refusal = common.kinds(site.anchor, [("the norm's weight", weight)])
    if _writes_into(norm.weight, None, words):
        return Refusal("mutation-between", "{} writes the norm's weight after {}", norm.weight, site.at)
    if isinstance(norm.weight, Node) and effects.position.get(norm.weight, -1) > effects.position[site.at]:
        return Refusal("late-operand", "{} comes after {}", norm.weight, site.at)
    end = site.end
    refusal = refusal or movable([("the sum", Operand(end, end))], end, norm.result, effects, norm.parts)
    # The weight's read moves to the sum: from after it or, if a cast of the weight was made early, from before it.
    first, last = sorted((norm.weight_read, site.at), key=effects.position.__getitem__)
    reads = [] if norm.weight is None else [("the norm's weight", Operand(norm.weight, first))]
    return refusal or movable(reads, first, last, effects)


def _writes_into(node: object, written: Node | None, words: Vocabulary) -> bool:
    """Whether the node writes its result into the `written` tensor, or into any tensor if that is None."""
    meaning = words.meaning(node)
    return meaning is not None and meaning.in_place and written in (None, meaning.operands[0])


STAGE = Stage(
    name="rms_norm",
    formula="normed = out * rsqrt(mean(out ** 2, -1, keepdim=True) + eps) * (offset + weight)",
    needs=(
        "an RMSNorm over the last dim of the sum, torch's own or written out",
        "a weight of one number per column, in the sum's dtype or float32, and a number added to it, or neither",
        "the result in the sum's dtype; nothing in between with other readers",
    ),
    codes=common.CODES | norms.CODES | {"late-operand": "the norm's weight is computed after the sum"},
    grow=grow,
)
