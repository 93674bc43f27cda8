"""The core: which adds are, or nearly are, a + sigmoid(gate) * b.

`find` walks backwards from one add-like node and returns every way to read it as the formula, best first. It does not judge
them; the guards do. A reading that goes through casts, other views or a scale is a near miss. It is kept so that the
report can say what stood in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from fusionpass.graph.naming import describe
from fusionpass.graph.nodes import is_expand, is_identity, is_reshape
from fusionpass.graph.refusal import Refusal
from fusionpass.graph.tensors import known_equal, same_sizes, tensor_of
from fusionpass.graph.vocabulary import Meaning, Vocabulary
from fusionpass.rules.between import REACH, obstacle, walk_back
from fusionpass.rules.rule import Reading
from fusionpass.rules.site import Operand, Site

# Nodes that compute the formula's sum or product as a part, which the pass does not look into; and what they compute.
OTHER_SUMS = {"lerp": "a + sigmoid(gate) * (b - a)", "index_add": "a sum at the places that an index names"}
OTHER_PRODUCTS = {"glu": "b * sigmoid(gate) of the halves of one tensor", "einsum": "a product with the sigmoid"}

# The operations at which a reading begins.
ANCHORS = ("add", "add_", "addcmul", "addcmul_", *OTHER_SUMS)


@dataclass(kw_only=True, eq=False)
class GatedSite(Site):
    """One a + sigmoid(gate) * b.

    Attributes:
        product: the mul, or the anchor itself for addcmul.
        handed_on: the product and the nodes that hand it on to the sum. Only the sum may read them.
    """

    product: Node
    sigmoid: Node
    handed_on: list[Node]


def find(words: Vocabulary, add: Node) -> Iterator[Reading]:
    """Every reading of `add` as the formula, with what stands between its nodes (None: nothing does).

    The right-hand addend is tried as the product first, then the left-hand one. In a product, the left factor is tried
    as the sigmoid first. So if two readings hold, as in `s1 * x + s2 * y`, the choice is always the same.
    """
    total = words.meaning(add)
    if total is None:
        yield from _other_sum(words, add)
    elif total.op == "addcmul":
        yield from _readings_of_addcmul(words, add, total)
    elif len(total.operands) == 2:
        left, right = total.operands
        for addend, a in ((right, left), (left, right)):
            yield from _readings_of_addend(words, add, total, addend, a)


def _readings_of_addcmul(words: Vocabulary, add: Node, total: Meaning) -> Iterator[Reading]:
    if len(total.operands) != 3:
        return
    a, left, right = total.operands
    for gated, b in ((left, right), (right, left)):
        yield from _readings(words, (add, total), [], a, gated, b, total.oddity)


def _readings_of_addend(words: Vocabulary, add: Node, total: Meaning, addend: object, a: object) -> Iterator[Reading]:
    product, between = walk_back(words, addend)
    meaning = words.meaning(product)
    if product is None:
        return
    if meaning is None or meaning.op != "mul" or len(meaning.operands) != 2:
        yield from _other_product(words, add, product)
        return
    refusal = obstacle(words, between, product, add, _keeps_rows) or total.oddity or meaning.oddity
    for gated, b in (meaning.operands, meaning.operands[::-1]):
        yield from _readings(words, (add, total), [product, *reversed(between)], a, gated, b, refusal)


def _readings(
    words: Vocabulary,
    total: tuple[Node, Meaning],
    handed_on: list[Node],
    a: object,
    gated: object,
    b: object,
    refusal: Refusal | None,
) -> Iterator[Reading]:
    add, meaning_of_sum = total
    product = handed_on[0] if handed_on else add
    sigmoid, between = walk_back(words, gated)
    scaled = _scaled_sigmoid(words, sigmoid)
    if scaled is not None:
        if not _elementwise(sigmoid, scaled, product):
            return
        written = words.meaning(sigmoid)
        if written.in_place and written.operands[0] is scaled:
            refusal = refusal or Refusal("mutation-between", "{} may write {} before {}", sigmoid, scaled, product)
        refusal = refusal or Refusal("scaled", "{} multiplies {} once more", product, sigmoid)
        sigmoid, between = scaled, []
    meaning = words.meaning(sigmoid)
    if sigmoid is None or meaning is None or meaning.op != "sigmoid" or len(meaning.operands) != 1:
        return
    refusal = refusal or obstacle(words, between, sigmoid, product, _keeps_gates) or meaning.oddity
    (gate,) = meaning.operands
    for name, operand in (("a", a), ("b", b), ("gate", gate)):
        if not isinstance(operand, Node):
            refusal = refusal or Refusal("scalar-operand", "{} of {} is {!r}, not a tensor", name, add, operand)
    parts = [sigmoid, *reversed(between), *handed_on, add]
    site = GatedSite(
        anchor=add,
        operands={"a": Operand(a, add), "gate": Operand(gate, sigmoid), "b": Operand(b, product)},
        parts=parts,
        overwrites=meaning_of_sum.operands[0] if meaning_of_sum.in_place else None,
        in_place={
            node: m.operands[0] for node in parts if (m := words.meaning(node)) and m.in_place and node is not add
        },
        product=product,
        sigmoid=sigmoid,
        handed_on=handed_on,
    )
    shapes = {} if refusal is not None else _seen_through_views(words, site, list(reversed(between)))
    if isinstance(shapes, Refusal):
        yield site, shapes
    else:
        yield site.changed(shapes=shapes) if shapes else site, refusal


def _scaled_sigmoid(words: Vocabulary, node: Node | None) -> Node | None:
    """The sigmoid in 2 * sigmoid(g), in sigmoid(g) * b, or in a mask times one of these: there is one factor too many."""
    for _ in range(REACH):
        meaning = words.meaning(node)
        if meaning is None or meaning.op != "mul":
            return None
        factors = [walk_back(words, factor)[0] for factor in meaning.operands]
        for factor in factors:
            if words.operation(factor) in ("sigmoid", "sigmoid_"):
                return factor
        node = next((factor for factor in factors if words.operation(factor) in ("mul", "mul_")), None)
    return None


def _elementwise(inner: Node, sigmoid: Node, product: Node) -> bool:
    """Whether the extra factor goes with each gate or with each element of the product. An outer product, as in the delta
    rule's recurrence, is not the formula with one factor too many."""
    shapes = [tensor_of(node) for node in (inner, sigmoid, product)]
    if None in shapes:
        return True
    own, gate, whole = (tensor.shape for tensor in shapes)
    return same_sizes(own, gate) or same_sizes(own, whole)


def _other_sum(words: Vocabulary, add: Node) -> Iterator[Reading]:
    if any(_is_gated(words, operand) for operand in add.all_input_nodes):
        operation = words.operation(add)
        yield None, Refusal("other-form", "{} ({}) computes {} in one node", add, operation, OTHER_SUMS[operation])


def _other_product(words: Vocabulary, add: Node, product: Node) -> Iterator[Reading]:
    einsum = words.einsum(product)
    name = words.operation(product) if einsum is None else "einsum"
    if name == "glu" or (einsum is not None and any(_is_gated(words, operand) for operand in product.all_input_nodes)):
        text = "{} adds {} ({}), which computes {} in one node"
        yield None, Refusal("other-form", text, add, product, name, OTHER_PRODUCTS[name])


def _is_gated(words: Vocabulary, operand: Node) -> bool:
    """Whether the operand is a sigmoid or a product with one."""
    node, _ = walk_back(words, operand)
    return words.operation(node) in ("sigmoid", "sigmoid_") or _scaled_sigmoid(words, node) is not None


def _keeps_gates(node: Node) -> bool:
    """Whether a view after the sigmoid leaves each gate at its row: it keeps their order, or repeats a gate for many
    columns."""
    return _keeps_rows(node) or is_expand(node)


def _keeps_rows(node: Node) -> bool:
    """Whether a view after the product leaves its elements in order. (`view(dtype)` would read other numbers.)"""
    before, after = tensor_of(node.args[0]), tensor_of(node)
    return is_reshape(node) and before is not None and after is not None and before.dtype == after.dtype


def _seen_through_views(words: Vocabulary, site: GatedSite, after_sigmoid: list[Node]) -> dict[str, tuple] | Refusal:
    """The shapes that views between the formula's nodes give the gate and b, if there are such views."""
    views = [node for node in after_sigmoid if words.operation(node) != "dropout" and not is_identity(node)]
    moved = [node for node in site.handed_on[1:] if words.operation(node) != "dropout" and not is_identity(node)]
    if not (views or moved):
        return {}
    gate, b = site.node("gate"), site.node("b")
    first = describe((views + moved)[0], words)
    refusal = Refusal("view-between", "{} reaches {} through {}", site.sigmoid, site.anchor, first)
    if any(tensor_of(node) is None for node in (gate, b, site.product, site.anchor, *views, *moved)):
        return refusal
    reshapes = [node for node in views if not is_expand(node)]
    if any(is_expand(node) for node in views[: len(reshapes)]):  # a reshape after an expand: there are many gates
        return refusal
    gates = tuple(tensor_of(reshapes[-1] if reshapes else gate).shape)
    if not moved:
        return {"gate": gates} if reshapes else {}
    product, total, factor = (tensor_of(node).shape for node in (site.product, site.anchor, b))
    if not (product and total) or not known_equal(product[-1], total[-1]) or not same_sizes(factor, product):
        return refusal
    if same_sizes(gates, (*product[:-1], 1)):
        gates = (*total[:-1], 1)
    elif same_sizes(gates, product):
        gates = tuple(total)
    else:
        return refusal
    return {"gate": gates, "b": tuple(total)}
