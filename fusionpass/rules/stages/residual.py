"""out = residual + sum: the add that follows the formula, through views that keep the rows' order, either way round.

h = sum.float() + residual.float(); residual = h.to(dtype)      serving engines: the next norm reads h, others the cast
residual += sum                                                 the op's result is copied into the residual's memory
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fusionpass.graph.effects import Effects
from fusionpass.graph.naming import describe
from fusionpass.graph.nodes import is_cast, is_identity, is_reshape, readers
from fusionpass.graph.refusal import Refusal
from fusionpass.graph.tensors import known_contiguous, same_sizes, shape_text, tensor_of
from fusionpass.graph.vocabulary import Vocabulary
from fusionpass.rules.gated_add_core import find
from fusionpass.rules.moving import movable, site_movable
from fusionpass.rules.rule import Stage
from fusionpass.rules.site import Operand, Site
from fusionpass.rules.stages import common


def grow(site: Site, words: Vocabulary, effects: Effects) -> Site | Refusal:
    """The site with the add, or why it stays outside."""
    refusal = common.combinable(site)
    if refusal is not None:
        return refusal
    total_before = site.end
    parts, node = [], total_before
    while True:
        found = readers(node)
        if len(found) != 1:
            names = ", ".join(sorted(each.name for each in found)) or "nothing"
            return Refusal("used-elsewhere", "{} is read by {}", node, names)
        (reader,) = found
        if not _hands_on(node, reader):
            break
        parts.append(reader)
        node = reader
    meaning = words.meaning(reader)
    if meaning is None or meaning.op != "add" or len(meaning.operands) != 2:
        return Refusal("not-a-residual", "{} goes to {}", total_before, describe(reader, words))
    if meaning.oddity is not None:
        return meaning.oddity
    if any(other is not None and other.node("a") is node for other, _ in find(words, reader)):
        return Refusal("another-sum", "{} adds a gated product of its own to {}", reader, node)
    left, right = meaning.operands
    residual = right if left is node else left
    total, given, added = tensor_of(reader), tensor_of(residual), tensor_of(node)
    if left is right or given is None or total is None or added is None:
        return Refusal("not-a-residual", "{} adds {}", reader, residual)
    if not (same_sizes(given.shape, total.shape) and same_sizes(added.shape, total.shape)) or added.dim() == 0:
        return Refusal("shape", "the residual is {}, the sum {}", shape_text(given), shape_text(added))
    if not same_sizes(added.shape[-1:], tensor_of(total_before).shape[-1:]):
        return Refusal("shape", "{} cuts the rows of {}", node, total_before)
    if not known_contiguous(total):
        return Refusal("stride", "{} has strides {}", reader, tuple(total.stride()))
    written = meaning.in_place and left is residual
    if meaning.in_place and not written and effects.other_reader(left, reader) is not None:
        return Refusal("in-place", "{} overwrites {}, which others read", reader, left)
    source, cast = _before_widening(residual, reader)
    refusal = common.kinds(site, [("residual", tensor_of(source)), ("the sum", total)])
    refusal = refusal or site_movable(site, reader, effects)
    if refusal is not None:
        return refusal
    read = Operand(source, cast[0] if cast else reader)
    if cast and movable([("the residual", read)], cast[0], reader, effects):
        read, cast = Operand(residual, reader), []  # the cast stays, and is read where it was read before
    return site.grown(
        "residual",
        after=[*cast, *parts, reader],
        operands={"residual": read},
        results=[reader],
        at=reader,
        written_back="residual" if written else None,
        op=common.MOE_COMBINE,
    )


def _hands_on(node: Node, reader: Node) -> bool:
    """Whether the reader hands the node's rows on unchanged: a view, a cast that does nothing, or a cast to float32."""
    before, after = tensor_of(node), tensor_of(reader)
    if before is None or after is None or reader.args[:1] != (node,):
        return False
    if is_cast(reader):
        return is_identity(reader) or (after.dtype is torch.float32 and same_sizes(before.shape, after.shape))
    return is_reshape(reader) and before.dtype == after.dtype


def _before_widening(residual: Node, reader: Node) -> tuple[Node, list[Node]]:
    """The residual before it was cast to float32 for this sum only, and the cast. (The op widens by itself.)"""
    if not is_cast(residual) or readers(residual) != [reader] or not isinstance(residual.args[0], Node):
        return residual, []
    before, after = tensor_of(residual.args[0]), tensor_of(residual)
    if before is None or after.dtype is not torch.float32 or not same_sizes(before.shape, after.shape):
        return residual, []
    if before.device != after.device or before.dtype not in (torch.bfloat16, torch.float16):
        return residual, []
    return residual.args[0], [residual]


STAGE = Stage(
    name="residual",
    formula="out = residual + out",
    needs=(
        "the sum's only reader is an add, apart from views that keep its rows",
        "a residual of the shape and device of that add, which is contiguous",
        "no write to an operand of the formula before that add",
    ),
    codes=common.CODES
    | {
        "not-a-residual": "the sum's reader is not an addition of another tensor",
        "another-sum": "the sum's reader is a site of its own, or nearly one, with the sum as its a",
        "used-elsewhere": "the sum has other readers, so it must stay",
        "scaled": "alpha other than 1",
        "odd-call": "the call has arguments the formula does not have",
        "out-argument": "the add writes into a given tensor",
        "in-place": "the add overwrites memory that others read",
    },
    grow=grow,
)
