"""The core: which adds are, or nearly are, a + sigmoid(gate) * b.

`find` walks backwards from one add-like node and returns every way to read it as the formula, best first, without
judging: judging is the guards' work. A reading that goes through views, casts or a scale is a near miss, kept so that the
report can say what stood in between.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from fusionpass.match import Refusal, Site
from fusionpass.nodes import is_cast, is_view
from fusionpass.tensors import known_equal, same_sizes, same_strides, storage_key, tensor_of
from fusionpass.vocabulary import Meaning, Vocabulary
from fusionpass.writes import call_name

# How many views and casts a near miss may lie behind; real models have at most 3 (chunk, getitem, cast).
REACH = 4


def is_sum(words: Vocabulary, node: Node) -> bool:
    return words.operation(node) in ("add", "add_", "addcmul", "addcmul_")


def find(words: Vocabulary, add: Node) -> Iterator[tuple[Site, Refusal | None]]:
    """Every reading of `add` as the formula, with what stands between its nodes (None: nothing does).

    The right-hand addend is read as the product first, then the left-hand one, and in a product its left factor as the
    sigmoid first: where two readings hold, as in `s1 * x + s2 * y`, the choice is always the same.
    """
    total = words.meaning(add)
    if total is None:
        return
    if total.op == "addcmul":
        yield from _readings_of_addcmul(words, add, total)
        return
    if len(total.operands) != 2:
        return
    left, right = total.operands
    for addend, a in ((right, left), (left, right)):
        product, between = walk_back(addend)
        meaning = words.meaning(product)
        if product is None or meaning is None or meaning.op != "mul" or len(meaning.operands) != 2:
            continue
        refusal = obstacle(between, product, add) or total.oddity or meaning.oddity
        if meaning.in_place:
            refusal = refusal or Refusal(
                "in-place", "{} multiplies in place, so {} holds the product afterwards", product, meaning.operands[0]
            )
        for gated, b in (meaning.operands, meaning.operands[::-1]):
            yield from _readings(words, (add, total), [product, *reversed(between)], a, gated, b, refusal)


def _readings_of_addcmul(words: Vocabulary, add: Node, total: Meaning) -> Iterator[tuple[Site, Refusal | None]]:
    if len(total.operands) != 3:
        return
    a, left, right = total.operands
    for gated, b in ((left, right), (right, left)):
        yield from _readings(words, (add, total), [], a, gated, b, total.oddity)


def _readings(
    words: Vocabulary,
    total: tuple[Node, Meaning],
    handed_on: list[Node],
    a: object,
    gated: object,
    b: object,
    refusal: Refusal | None,
) -> Iterator[tuple[Site, Refusal | None]]:
    add, meaning_of_sum = total
    product = handed_on[0] if handed_on else add
    sigmoid, between = walk_back(gated)
    scale = words.meaning(sigmoid)
    if scale is not None and scale.op == "mul" and sigmoid is not None:  # a + (2 * sigmoid(g)) * b
        factors = [f for f in scale.operands if isinstance(f, Node)]
        if len(factors) == 1 and words.operation(factors[0]) in ("sigmoid", "sigmoid_"):
            refusal = refusal or Refusal("scaled", "{} scales the sigmoid before the product", sigmoid)
            sigmoid = factors[0]
    meaning = words.meaning(sigmoid)
    if sigmoid is None or meaning is None or meaning.op != "sigmoid" or len(meaning.operands) != 1:
        return
    refusal = refusal or obstacle(between, sigmoid, product) or meaning.oddity
    if meaning.in_place:
        refusal = refusal or Refusal("in-place", "{} overwrites the gate logit {}", sigmoid, meaning.operands[0])
    (gate,) = meaning.operands
    for name, operand in (("a", a), ("b", b), ("gate", gate)):
        if not isinstance(operand, Node):
            refusal = refusal or Refusal("scalar-operand", "{} of {} is {!r}, not a tensor", name, add, operand)
    parts = [sigmoid, *reversed(between), *handed_on, add]
    yield Site(add, product, sigmoid, a, gate, b, parts, handed_on, writes_a=meaning_of_sum.in_place), refusal


def walk_back(value: object) -> tuple[Node | None, list[Node]]:
    """The first node behind `value` that is no view and no cast, and the views and casts before it, nearest last."""
    between: list[Node] = []
    while isinstance(value, Node) and (is_view(value) or is_cast(value)) and len(between) < REACH and value.args:
        between.append(value)
        value = value.args[0]
    return (value if isinstance(value, Node) else None), between


def obstacle(between: list[Node], source: Node, reader: Node) -> Refusal | None:
    """Why the nodes between `source` and `reader` matter; None when each of them hands on the very same tensor."""
    for node in between:
        if not is_identity(node):
            kind = "cast-between" if is_cast(node) else "view-between"
            return Refusal(kind, "{} reaches {} through {}", source, reader, node)
    return None


def is_identity(node: Node) -> bool:
    """Whether a cast or view returns its input unchanged: `.to(same dtype)`, `.contiguous()` of a contiguous tensor."""
    before, after = tensor_of(node.args[0]), tensor_of(node)
    if before is None or after is None or before.dtype != after.dtype or before.dim() != after.dim():
        return False
    key = storage_key(before)
    return (
        call_name(node) != "detach"  # the same memory, but no gradient
        and key is not None
        and key == storage_key(after)
        and same_sizes(before.shape, after.shape)
        and same_strides(before, after)
        and known_equal(before.storage_offset(), after.storage_offset())
    )
