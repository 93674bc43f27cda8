"""out = residual + sum: the add that follows the formula, through views that keep the rows' order, either way round."""

from __future__ import annotations

from fusionpass.effects import Effects
from fusionpass.match import Refusal, RuleInfo, Site
from fusionpass.nodes import is_cast, is_reshape, readers
from fusionpass.options import Options
from fusionpass.pattern import find, is_identity
from fusionpass.stages import common
from fusionpass.tensors import known_contiguous, same_sizes, shape_text, tensor_of
from fusionpass.vocabulary import Vocabulary

INFO = RuleInfo(
    name="residual",
    kind="stage",
    formula="out = residual + (a + sigmoid(gate) * b)",
    needs=(
        "the sum's only reader is an add, views that keep its rows apart",
        "a residual of the shape, dtype and device of that add, which is contiguous",
        "no write to an operand of the formula before that add",
    ),
    codes=common.CODES
    | {
        "not-a-residual": "what reads the sum is no addition of another tensor",
        "another-sum": "what reads the sum is a site of its own, or nearly one, with the sum as its a",
        "used-elsewhere": "the sum has other readers, so it must stay",
        "scaled": "alpha other than 1",
        "odd-call": "the call has arguments the formula does not have",
        "out-argument": "the add writes into a given tensor",
        "in-place": "the add overwrites the residual",
    },
)


def grow(site: Site, words: Vocabulary, effects: Effects, options: Options) -> Refusal | None:
    """Absorb the add into the site; the reason when it stays outside, and then the site is unchanged."""
    refusal = common.combinable(site, options)
    if refusal is not None:
        return refusal
    parts, node = [], site.add
    while True:
        found = readers(node)
        if len(found) != 1:
            names = ", ".join(sorted(each.name for each in found)) or "nothing"
            return Refusal("used-elsewhere", "{} is read by {}", node, names)
        (reader,) = found
        hands_on = is_reshape(reader) or (is_cast(reader) and is_identity(reader))
        if not hands_on or tensor_of(reader) is None or reader.args[:1] != (node,):
            break
        parts.append(reader)
        node = reader
    meaning = words.meaning(reader)
    if meaning is None or meaning.op != "add" or len(meaning.operands) != 2:
        return Refusal("not-a-residual", "{} goes to {}", site.add, reader)
    if meaning.oddity is not None:
        return meaning.oddity
    if meaning.in_place:
        return Refusal("in-place", "{} overwrites {}", reader, meaning.operands[0])
    if any(other.a is node for other, _ in find(words, reader)):
        return Refusal("another-sum", "{} adds a gated product of its own to {}", reader, node)
    left, right = meaning.operands
    residual = right if left is node else left
    total, given, added = tensor_of(reader), tensor_of(residual), tensor_of(node)
    if left is right or given is None or total is None or added is None:
        return Refusal("not-a-residual", "{} adds {}", reader, residual)
    if not (same_sizes(given.shape, total.shape) and same_sizes(added.shape, total.shape)) or added.dim() == 0:
        return Refusal("shape", "the residual is {}, the sum {}", shape_text(given), shape_text(added))
    if not same_sizes(added.shape[-1:], tensor_of(site.add).shape[-1:]):
        return Refusal("shape", "{} cuts the rows of {}", node, site.add)
    if not known_contiguous(total):
        return Refusal("stride", "{} has strides {}", reader, tuple(total.stride()))
    refusal = common.kinds(site, [("residual", given), ("the sum", total)])
    refusal = refusal or common.movable([(*o, site.add) for o in common.operands(site)], site.add, reader, effects)
    if refusal is None:
        site.residual = residual
        site.end = reader
        site.parts += [*parts, reader]
        site.stages.append(INFO.name)
    return refusal
