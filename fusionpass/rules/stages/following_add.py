"""The add that follows a site's sum, for the stages that take it in: what leads to it, and what else it adds."""

from __future__ import annotations

from math import frexp
from typing import NamedTuple

import torch
from torch.fx import Node

from fusionpass.graph.effects import Effects
from fusionpass.graph.identity import torch_name
from fusionpass.graph.naming import describe
from fusionpass.graph.nodes import is_cast, is_identity, is_reshape, readers
from fusionpass.graph.refusal import Refusal
from fusionpass.graph.tensors import known_contiguous, same_sizes, shape_text, tensor_of
from fusionpass.graph.vocabulary import Meaning, Vocabulary
from fusionpass.kernels.contract import DTYPES
from fusionpass.rules.moving import movable, site_movable
from fusionpass.rules.site import Operand, Site
from fusionpass.rules.stages import common

CODES = common.CODES | {
    "used-elsewhere": "the sum has other readers, so it must stay",
    "scaled": "alpha other than 1",
    "odd-call": "the call has arguments the formula does not have",
    "out-argument": "the add writes into a given tensor",
    "in-place": "the add overwrites memory that others read",
}


class Following(NamedTuple):
    """The one reader of a sum, behind what hands the sum's rows on."""

    sum: Node  # as the reader reads it
    add: Node  # the reader, whatever it is
    meaning: Meaning | None  # of the reader, if it is an addition
    scale: float  # a number that the rows are multiplied by on the way
    parts: list[Node]  # the nodes on the way

    @property
    def other(self) -> Node | None:
        """The tensor that the reader adds to the sum; None if it does something else."""
        if self.meaning is None:
            return None
        left, right = self.meaning.operands
        other = right if left is self.sum else left
        known = all(tensor_of(node) is not None for node in (self.add, self.sum, other))
        return other if known and left is not right else None

    def instead(self, words: Vocabulary) -> str:
        """What the reader does, if it adds no other tensor."""
        return f"{self.sum} goes to {describe(self.add, words)}"


class Added(NamedTuple):
    """What the add adds to the sum."""

    other: Node  # as the add reads it
    operand: Operand  # as the op reads it: before a cast to float32 for this sum alone
    written: bool  # whether the result lands in its memory
    parts: list[Node]  # that cast, the nodes on the way to the add, and the add


def following_add(site: Site, words: Vocabulary) -> Following | Refusal:
    refusal = common.combinable(site)
    if refusal is not None:
        return refusal
    parts, node, scale = [], site.end, 1.0
    while True:
        found = readers(node)
        if len(found) != 1:
            names = ", ".join(sorted(each.name for each in found)) or "nothing"
            return Refusal("used-elsewhere", "{} is read by {}", node, names)
        (reader,) = found
        factor = 1.0 if _hands_on(node, reader) else _factor(node, reader, words)
        if factor is None or not _in_range(scale * factor):
            break
        scale *= factor
        parts.append(reader)
        node = reader
    meaning = words.meaning(reader)
    if meaning is None or meaning.op != "add" or len(meaning.operands) != 2:
        meaning = None
    elif meaning.oddity is not None:
        return meaning.oddity
    return Following(node, reader, meaning, scale, parts)


def added(site: Site, following: Following, effects: Effects, name: str) -> Added | Refusal:
    """What is added, if the op can add it: an operand of this name in sentences."""
    node, add, meaning, _, parts = following
    left, other = meaning.operands[0], following.other
    total, given, summed = tensor_of(add), tensor_of(other), tensor_of(node)
    if not (same_sizes(given.shape, total.shape) and same_sizes(summed.shape, total.shape)) or summed.dim() == 0:
        return Refusal("shape", "the {} is {}, the sum {}", name, shape_text(given), shape_text(summed))
    if not same_sizes(summed.shape[-1:], tensor_of(site.end).shape[-1:]):
        return Refusal("shape", "{} cuts the rows of {}", node, site.end)
    if not known_contiguous(total):
        return Refusal("stride", "{} has strides {}", add, tuple(total.stride()))
    written = meaning.in_place and left is other
    if meaning.in_place and not written and effects.other_reader(left, add) is not None:
        return Refusal("in-place", "{} overwrites {}, which others read", add, left)
    # What is written into is the cast's memory, not what was cast.
    source, cast = (other, []) if written else _before_widening(other, add)
    refusal = common.kinds(site.anchor, [(name, tensor_of(source)), ("the sum", total)])
    refusal = refusal or site_movable(site, add, effects)
    if refusal is not None:
        return refusal
    read = Operand(source, cast[0] if cast else add)
    if cast and movable([(f"the {name}", read)], cast[0], add, effects):
        read, cast = Operand(other, add), []  # the cast stays, and is read where it was
    return Added(other, read, written, [*cast, *parts, add])


def handed_on(node: Node) -> tuple[Node, list[Node]]:
    """The node's value as its one reader in the end has it, behind views and a cast from float32, and these."""
    parts: list[Node] = []
    while len(readers(node)) == 1 and _hands_on(node, readers(node)[0]):
        (reader,) = readers(node)
        if tensor_of(reader).dtype is torch.float32 and tensor_of(node).dtype is not torch.float32:
            break  # a norm's own
        parts.append(reader)
        node = reader
    return node, parts


def _hands_on(node: Node, reader: Node) -> bool:
    """Whether the reader gives the rows of the node on as they are: a view, a cast that does nothing, or one from or to
    float32, in which the op computes."""
    before, after = tensor_of(node), tensor_of(reader)
    if before is None or after is None or reader.args[:1] != (node,):
        return False
    if is_cast(reader):
        through = torch.float32 in (before.dtype, after.dtype) and {before.dtype, after.dtype} <= set(DTYPES)
        return is_identity(reader) or (through and same_sizes(before.shape, after.shape))
    return is_reshape(reader) and before.dtype == after.dtype


def _in_range(number: float) -> bool:
    """Whether float32, in which the op computes, has the number: products of factors may leave its range."""
    return number == 0 or 2.0**-126 <= abs(number) < 2.0**127


def _factor(node: Node, reader: Node, words: Vocabulary) -> float | None:
    """The number that the reader multiplies the node by: `* 2.5`, or `/ 2`, whose inverse is exact."""
    after = tensor_of(reader)
    if after is None or after.dtype != tensor_of(node).dtype:
        return None
    product = words.plain(reader, "mul")
    if product is not None and node in product:
        number = product[1] if product[0] is node else product[0]
        return float(number) if _is_number(number) else None
    divides = torch_name(reader) in ("truediv", "div") and not reader.kwargs and len(reader.args) == 2
    if divides and reader.args[0] is node and _is_number(reader.args[1]) and abs(frexp(reader.args[1])[0]) == 0.5:
        return 1 / reader.args[1]
    return None


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and _in_range(value)


def _before_widening(other: Node, reader: Node) -> tuple[Node, list[Node]]:
    """The tensor before it was cast to float32 for this sum alone, which the op does by itself, and the cast."""
    if not is_cast(other) or readers(other) != [reader] or not isinstance(other.args[0], Node):
        return other, []
    before, after = tensor_of(other.args[0]), tensor_of(other)
    if before is None or after.dtype is not torch.float32 or not same_sizes(before.shape, after.shape):
        return other, []
    if before.device != after.device or before.dtype not in (torch.bfloat16, torch.float16):
        return other, []
    return other.args[0], [other]
