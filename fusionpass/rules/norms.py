"""How a value is read by its RMSNorm, x * rsqrt(mean(x ** 2) + eps) * (offset + weight), whatever the spelling.

weight * (x * rsqrt(mean(x ** 2) + eps)).to(dtype)              x = value.to(float32); Llama, Qwen2
(x * rsqrt(mean(x ** 2) + eps) * (1 + weight.float())).to(dtype)                       Gemma, Qwen3-Next
(x * pow(mean(x ** 2) + eps, -0.5) * weight.float()).to(dtype)                         Gemma 4
rms_norm(value, (H,), weight, eps)                                                     torch's own
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from fusionpass.graph.effects import Effects
from fusionpass.graph.naming import describe
from fusionpass.graph.nodes import is_cast, is_identity, readers
from fusionpass.graph.refusal import Refusal
from fusionpass.graph.tensors import known_contiguous, known_equal, same_sizes, settled, shape_text, tensor_of, value_of
from fusionpass.graph.vocabulary import Vocabulary
from fusionpass.kernels.contract import DTYPES

CODES = {
    "not-an-rms-norm": "no reader of the sum is an RMSNorm of its rows",
    "used-elsewhere": "a node of the norm has other readers, so it must stay",
    "module-hook": "the norm's module has hooks",
    "module-forward": "the norm's module runs a forward that is not torch's own",
    "in-place": "a node of the norm overwrites memory that others read",
}


@dataclass(frozen=True)
class Norm:
    """The RMSNorm that reads a value: its nodes in the order of the data flow, `result` the last."""

    weight: Node | str | None
    eps: float
    offset: float
    result: Node
    parts: list[Node]
    weight_read: Node  # the first of its nodes that reads the weight


def norm_of(value: Node, kept: torch.dtype, words: Vocabulary, effects: Effects) -> Norm | Refusal | None:
    """The RMSNorm that reads the value; `kept` is the dtype that others read of it. None if no reader is one."""
    return _torch_norm(value, words) or _written_out(value, words, effects, kept)


def no_norm(value: Node, words: Vocabulary) -> Refusal:
    names = "; ".join(sorted(describe(reader, words) for reader in readers(value))) or "nothing"
    return Refusal("not-an-rms-norm", "{} is read by {}", value, names)


def unfit(norm: Norm, total: torch.Tensor, words: Vocabulary) -> Refusal | None:
    """Why the op does not give what the norm of `total` gives, by shape, dtype and strides."""
    result, weight = tensor_of(norm.result), words.tensor(norm.weight)
    if result is None or not same_sizes(result.shape, total.shape) or result.dtype != total.dtype:
        return Refusal("dtype", "the norm {} is not of the sum's shape and dtype", norm.result)
    if not known_contiguous(result):
        return Refusal("stride", "{} has strides {}", norm.result, tuple(result.stride()))
    if weight is not None and not same_sizes(weight.shape, total.shape[-1:]):
        return Refusal("shape", "the norm's weight is {}, the sum {}", shape_text(weight), shape_text(total))
    return None


def _torch_norm(end: Node, words: Vocabulary) -> Norm | Refusal | None:
    for user in end.users:
        meaning = words.meaning(user)
        if meaning is None or meaning.op != "rms_norm" or meaning.operands[0] is not end:
            continue
        if meaning.oddity is not None:
            return meaning.oddity
        _, shape, weight, eps = meaning.operands
        total = tensor_of(end)
        shape = settled(shape)
        shape = tuple(shape) if isinstance(shape, (list, tuple)) else (shape,)
        if len(shape) != 1 or isinstance(shape[0], Node) or not known_equal(shape[0], total.shape[-1]):
            return Refusal("not-an-rms-norm", "{} normalises over {}", user, list(shape))
        # The epsilon of the dtype in which it computes: for 16-bit dtypes ATen accumulates in float32.
        eps = torch.finfo(torch.float32).eps if eps is None else _number(eps)
        if eps is None:
            return Refusal("not-an-rms-norm", "the eps of {} is not a number that is known", user)
        if tensor_of(user) is not None:
            return Norm(_movable(weight), eps, 0.0, user, [user], user)
        result = [reader for reader in readers(user) if reader.target is operator.getitem and reader.args[1] == 0]
        if result != readers(user) or len(result) != 1:
            return Refusal("used-elsewhere", "{} has {} readers", user, len(readers(user)))
        return Norm(_movable(weight), eps, 0.0, result[0], [user, *result], user)
    return None


def _written_out(end: Node, words: Vocabulary, effects: Effects, kept: torch.dtype) -> Norm | Refusal | None:
    for casts in _float32_forms(end):
        wide = casts[-1] if casts else end
        for scaled in wide.users:
            found = _scaled_by_rms(wide, scaled, words)
            if found is None:
                continue
            eps, parts = found
            norm = _weighted(end, casts, scaled, eps, parts, kept, words)
            return norm if isinstance(norm, Refusal) else _overwrites_nothing(norm, words, effects) or norm
    return None


def _float32_forms(total: Node) -> Iterator[list[Node]]:
    """The casts from the sum to float32, also through casts that do nothing; none if the sum is float32."""
    if tensor_of(total).dtype is torch.float32:
        yield []
    for cast in total.users:
        if not is_cast(cast) or cast.args[:1] != (total,) or tensor_of(cast) is None:  # other.type_as(sum)
            continue
        if tensor_of(cast).dtype is torch.float32:
            yield [cast]
        elif is_identity(cast):
            yield from ([cast, *rest] for rest in _float32_forms(cast))


def _scaled_by_rms(wide: Node, scaled: Node, words: Vocabulary) -> tuple[float, list[Node]] | None:
    """(eps, nodes) if `scaled` is wide * rsqrt(mean(wide ** 2, -1, keepdim) + eps), in place or not."""
    product = words.operands(scaled, "mul")
    if product is None or wide not in product:
        return None
    rsqrt = product[1] if product[0] is wide else product[0]
    shifted = _shifted(_inside_rsqrt(rsqrt, words), words)
    if shifted is None:
        return None
    mean, eps = shifted if tensor_of(shifted[0]) is not None else shifted[::-1]
    eps = _number(eps)
    if not isinstance(mean, Node) or eps is None or words.plain(mean, "mean") is None:
        return None
    square = words.plain(mean, "mean")[0]
    if not isinstance(square, Node) or tensor_of(square) is None:
        return None
    if not words.reduces(mean, tensor_of(square).dim() - 1, keepdim=True) or not words.squares(square, wide):
        return None
    return eps, [square, mean, _inside_rsqrt(rsqrt, words), rsqrt, scaled]


def _inside_rsqrt(node: object, words: Vocabulary) -> object:
    """v of rsqrt(v), or of v ** -0.5."""
    inverse = words.plain(node, "rsqrt")
    if inverse is not None:
        return inverse[0]
    power = words.plain(node, "pow")
    return power[0] if power is not None and settled(power[1]) == -0.5 else None


def _overwrites_nothing(norm: Norm, words: Vocabulary, effects: Effects) -> Refusal | None:
    """`h.mul_(rsqrt)` may go only if nobody else reads h's memory afterwards."""
    for node in norm.parts:
        meaning = words.meaning(node)
        if meaning is None or not meaning.in_place or not isinstance(meaning.operands[0], Node):
            continue
        reader = effects.other_reader(meaning.operands[0], node)
        if reader is not None:
            return Refusal("in-place", "{} writes into {}, which {} shows or reads", node, meaning.operands[0], reader)
    return None


def _number(eps: object) -> float | None:
    """eps as a number. With dynamic=True an eps that is an attribute of the norm may be symbolic. Then a guard fixes
    it, because the kernel is compiled for its value, as for the hidden size. A node without a symbol has no guard: another
    call may bring another number."""
    if isinstance(eps, Node):
        value = value_of(eps)
        return float(value) if isinstance(value, torch.SymFloat) else None
    return float(eps) if isinstance(eps, (int, float, torch.SymFloat)) else None


def _shifted(node: object, words: Vocabulary) -> tuple | None:
    """(mean, eps) of mean + eps, in place or not. Nobody else may read the mean."""
    meaning = words.meaning(node)
    if (
        meaning is None
        or meaning.op not in ("add", "shift")
        or meaning.oddity is not None
        or len(meaning.operands) != 2
    ):
        return None
    return meaning.operands


def _weighted(
    total: Node,
    casts: list[Node],
    scaled: Node,
    eps: float,
    parts: list[Node],
    kept: torch.dtype,
    words: Vocabulary,
) -> Norm | Refusal:
    """The norm with what follows the scaling: a weight, before or after the cast back to the dtype that is kept of the
    sum."""
    norm = reached = Norm(None, eps, 0.0, scaled, [*casts, *parts], scaled)
    while len(readers(reached.result)) == 1:
        (reader,) = readers(reached.result)
        weight, offset, made, read = reached.weight, reached.offset, [], reached.weight_read
        if not (is_cast(reader) and reader.args[:1] == (reached.result,)):
            product = words.operands(reader, "mul") or ()
            factors = [factor for factor in product if factor is not reached.result]
            factor = _weight(factors[0], words) if len(factors) == 1 and weight is None else None
            if factor is None:
                break
            weight, offset, made = factor
            read = made[0] if made else reader
        if tensor_of(reader) is None or tensor_of(reader).dtype not in (torch.float32, kept):
            break
        reached = Norm(weight, eps, offset, reader, [*reached.parts, *made, reader], read)
        if tensor_of(reader).dtype == kept or tensor_of(norm.result).dtype != kept:
            norm = reached  # a later cast to float32, say for a router, belongs to its reader
    inside = set(norm.parts)
    # A cast of a float32 sum to float32 is the sum itself, and stays for its other readers.
    private = [part for part in norm.parts if part is not norm.result and not (part in casts and is_identity(part))]
    used = [other for part in private for other in readers(part) if other not in inside]
    if used:
        return Refusal("used-elsewhere", "the norm {} is read inside by {}", norm.result, used[0])
    return norm


def _weight(factor: object, words: Vocabulary) -> tuple[Node | str, float, list[Node]] | None:
    """(weight, offset, nodes that make the factor) of weight, weight.float() or 1 + weight.float()."""
    made: list[Node] = []
    offset = 0.0
    shifted = words.plain(factor, "add")
    if shifted is not None:
        number, other = shifted if isinstance(shifted[0], (int, float)) else shifted[::-1]
        if not isinstance(number, (int, float)) or not isinstance(other, Node):
            return None
        offset = float(number)
        made.insert(0, factor)
        factor = other
    # A node that others read too, such as a weight that is cast once for all, stays where it is and is read as it is.
    while isinstance(factor, Node) and _is_float_cast(factor) and len(readers(factor)) == 1:
        made.insert(0, factor)
        factor = factor.args[0]
    value = tensor_of(factor)
    if value is None or value.dim() != 1 or not isinstance(factor, Node):
        return None
    return _movable(factor), offset, made


def _is_float_cast(node: Node) -> bool:
    """Whether the node casts between dtypes that the op takes: it only rounds. A cast to integers does more."""
    if not is_cast(node) or not isinstance(node.args[0], Node):
        return False
    tensors = tensor_of(node.args[0]), tensor_of(node)
    return all(tensor is not None and tensor.dtype in DTYPES for tensor in tensors)


def _movable(weight: Node | str | None) -> Node | str | None:
    """The weight by its path, if it is a parameter. Tracers put the `get_attr` node just before its use, and the op stands
    earlier."""
    return str(weight.target) if isinstance(weight, Node) and weight.op == "get_attr" else weight
