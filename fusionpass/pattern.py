"""The core: which adds are, or nearly are, a + sigmoid(gate) * b.

`find` walks backwards from one add-like node and returns every way to read it as the formula, best first, without
judging: judging is the guards' work. A reading that goes through casts, other views or a scale is a near miss, kept so that
the report can say what stood in between.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from fusionpass.identity import torch_name
from fusionpass.match import Refusal, Site
from fusionpass.naming import describe
from fusionpass.nodes import is_cast, is_expand, is_reshape, is_view
from fusionpass.tensors import known_equal, same_sizes, same_strides, storage_key, tensor_of
from fusionpass.vocabulary import Meaning, Vocabulary

# How many views and casts a near miss may lie behind; real models have at most 3 (chunk, getitem, cast).
REACH = 4
# The formula's sum or product as part of one node that the pass does not read, and what that node computes.
OTHER_SUMS = {"lerp": "a + sigmoid(gate) * (b - a)", "index_add": "a sum at the places that an index names"}
OTHER_PRODUCTS = {"glu": "b * sigmoid(gate) of the halves of one tensor", "einsum": "a product with the sigmoid"}

# The operations at which a reading begins.
ANCHORS = ("add", "add_", "addcmul", "addcmul_", *OTHER_SUMS)

Reading = tuple[Site | None, Refusal | None]


def find(words: Vocabulary, add: Node) -> Iterator[Reading]:
    """Every reading of `add` as the formula, with what stands between its nodes (None: nothing does).

    The right-hand addend is read as the product first, then the left-hand one, and in a product its left factor as the
    sigmoid first: where two readings hold, as in `s1 * x + s2 * y`, the choice is always the same.
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
    overwrites = meaning_of_sum.operands[0] if meaning_of_sum.in_place else None
    site = Site(add, product, sigmoid, a, gate, b, parts, handed_on, overwrites=overwrites)
    site.in_place = {
        node: m.operands[0] for node in parts if (m := words.meaning(node)) and m.in_place and node is not add
    }
    refusal = refusal or _see_through_views(words, site, list(reversed(between)))
    yield site, refusal


def _scaled_sigmoid(words: Vocabulary, node: Node | None) -> Node | None:
    """The sigmoid in 2 * sigmoid(g), in sigmoid(g) * b, in a mask times either: something is multiplied once more."""
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
    """Whether what is multiplied once more is a factor for each gate or each element of the product: an outer product, as in
    the delta rule's recurrence, is no formula with a factor too many."""
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


def walk_back(words: Vocabulary, value: object) -> tuple[Node | None, list[Node]]:
    """The first node behind `value` that is no view, cast or dropout, and those before it, nearest last."""
    between: list[Node] = []
    while isinstance(value, Node) and len(between) < REACH and value.args:
        if not (is_view(value) or is_cast(value) or words.operation(value) == "dropout"):
            break
        between.append(value)
        value = value.args[0]
    return (value if isinstance(value, Node) else None), between


def obstacle(words: Vocabulary, between: list[Node], source: Node, reader: Node, harmless) -> Refusal | None:
    """Why the nodes between `source` and `reader` matter; None when each hands on the very same tensor, or is `harmless`."""
    for node in between:
        if words.operation(node) == "dropout":
            if not words.drops_nothing(node):
                text = "{} reaches {} through {}, which drops some or may do so later"
                return Refusal("dropout-between", text, source, reader, node)
        elif words.operation(node.args[0]) == "dropout":
            continue  # an element of its results: judged with it
        elif not is_identity(node) and not harmless(node):
            kind = "cast-between" if is_cast(node) else "view-between"
            return Refusal(kind, "{} reaches {} through {}", source, reader, describe(node, words))
    return None


def _keeps_gates(node: Node) -> bool:
    """Whether a view after the sigmoid leaves each gate with its rows: in their order, or the same for many columns."""
    return _keeps_rows(node) or is_expand(node)


def _keeps_rows(node: Node) -> bool:
    """Whether a view after the product leaves its elements in their order; `view(dtype)` would read other numbers."""
    before, after = tensor_of(node.args[0]), tensor_of(node)
    return is_reshape(node) and before is not None and after is not None and before.dtype == after.dtype


def _see_through_views(words: Vocabulary, site: Site, after_sigmoid: list[Node]) -> Refusal | None:
    """Give the gate and b the shapes that the views between the formula's nodes give the sigmoid and the product."""
    views = [node for node in after_sigmoid if words.operation(node) != "dropout" and not is_identity(node)]
    moved = [node for node in site.handed_on[1:] if words.operation(node) != "dropout" and not is_identity(node)]
    if not (views or moved):
        return None
    first = describe((views + moved)[0], words)
    refusal = Refusal("view-between", "{} reaches {} through {}", site.sigmoid, site.add, first)
    needed = (site.gate, site.b, site.product, site.add, *views, *moved)
    if any(tensor_of(node) is None for node in needed):
        return refusal
    reshapes = [node for node in views if not is_expand(node)]
    if any(is_expand(node) for node in views[: len(reshapes)]):  # a reshape behind an expand: the gates are many
        return refusal
    gate = tensor_of(reshapes[-1] if reshapes else site.gate).shape
    site.gate_shape = tuple(gate) if reshapes else None
    if not moved:
        return None
    product, total, b = (tensor_of(node).shape for node in (site.product, site.add, site.b))
    if not (product and total) or not known_equal(product[-1], total[-1]) or not same_sizes(b, product):
        return refusal
    if same_sizes(gate, (*product[:-1], 1)):
        site.gate_shape = (*total[:-1], 1)
    elif same_sizes(gate, product):
        site.gate_shape = tuple(total)
    else:
        return refusal
    site.b_shape = tuple(total)
    return None


def is_identity(node: Node) -> bool:
    """Whether a cast or view returns its input unchanged: `.to(same dtype)`, `.contiguous()` of a contiguous tensor."""
    before, after = tensor_of(node.args[0]), tensor_of(node)
    if before is None or after is None or before.dtype != after.dtype or before.dim() != after.dim():
        return False
    key = storage_key(before)
    return (
        torch_name(node) != "detach"  # the same memory, but no gradient
        and key is not None
        and key == storage_key(after)
        and same_sizes(before.shape, after.shape)
        and same_strides(before, after)
        and known_equal(before.storage_offset(), after.storage_offset())
    )
