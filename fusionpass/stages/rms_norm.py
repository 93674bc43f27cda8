"""normed = out * rsqrt(mean(out ** 2) + eps) * (offset + weight): the norm that the next layer begins with, a second result.

    weight * (x * rsqrt(mean(x ** 2) + eps)).to(dtype)              x = out.to(float32); Llama, Qwen2
    (x * rsqrt(mean(x ** 2) + eps) * (1 + weight.float())).to(dtype)                     Gemma, Qwen3-Next
    rms_norm(out, (H,), weight, eps)                                                     torch's own
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fusionpass.effects import Effects
from fusionpass.match import Norm, Refusal, RuleInfo, Site
from fusionpass.options import Options
from fusionpass.stages import common
from fusionpass.tensors import known_contiguous, known_equal, same_sizes, shape_text, tensor_of
from fusionpass.vocabulary import Vocabulary, is_cast

INFO = RuleInfo(
    name="rms_norm",
    kind="stage",
    formula="normed = out * rsqrt(mean(out ** 2) + eps) * (offset + weight)",
    needs=(
        "an RMSNorm over the last dim of the sum, torch's own or written out",
        "a weight of one number per column, or none, in the sum's dtype or float32; offset 0 or 1",
        "the result in the sum's dtype; nothing in between with other readers",
    ),
    codes=common.CODES
    | {
        "not-an-rms-norm": "no reader of the sum is an RMSNorm of its rows",
        "used-elsewhere": "a node of the norm has other readers, so it must stay",
        "module-hook": "the norm's module has hooks",
        "late-operand": "the norm's weight is computed after the sum",
    },
)


def grow(site: Site, words: Vocabulary, effects: Effects, options: Options) -> Refusal | None:
    """Absorb the norm into the site; the reason when it stays outside, and then the site is unchanged."""
    refusal = common.combinable(site, options)
    if refusal is not None:
        return refusal
    if not known_contiguous(tensor_of(site.end)):
        return Refusal("stride", "{} has strides {}", site.end, tuple(tensor_of(site.end).stride()))
    norm = _torch_norm(site, words) or _written_out(site, words)
    if norm is None:
        readers = ", ".join(sorted(user.name for user in site.end.users)) or "nothing"
        return Refusal("not-an-rms-norm", "{} is read by {}", site.end, readers)
    if isinstance(norm, Refusal):
        return norm
    total, result, weight = tensor_of(site.end), tensor_of(norm.result), words.tensor(norm.weight)
    if result is None or not same_sizes(result.shape, total.shape) or result.dtype != total.dtype:
        return Refusal("dtype", "the norm {} is not of the sum's shape and dtype", norm.result)
    if not known_contiguous(result):
        return Refusal("stride", "{} has strides {}", norm.result, tuple(result.stride()))
    if weight is not None:
        if not same_sizes(weight.shape, total.shape[-1:]):
            return Refusal("shape", "the norm's weight is {}, the sum {}", shape_text(weight), shape_text(total))
        refusal = common.kinds(site, [], wider=[("the norm's weight", weight)])
    if isinstance(norm.weight, Node) and effects.position.get(norm.weight, -1) > effects.position[site.end]:
        return Refusal("late-operand", "{} comes after {}", norm.weight, site.end)
    reads = [("the sum", site.end, site.end), ("the norm's weight", norm.weight, site.end)]
    refusal = refusal or common.movable(reads, site.end, norm.result, effects)
    if refusal is None:
        site.norm = norm
        site.parts += norm.parts
        site.stages.append(INFO.name)
    return refusal


def _torch_norm(site: Site, words: Vocabulary) -> Norm | Refusal | None:
    for user in site.end.users:
        meaning = words.meaning(user)
        if meaning is None or meaning.op != "rms_norm" or meaning.operands[0] is not site.end:
            continue
        if meaning.oddity is not None:
            return meaning.oddity
        _, shape, weight, eps = meaning.operands
        total = tensor_of(site.end)
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if len(shape) != 1 or not known_equal(shape[0], total.shape[-1]):
            return Refusal("not-an-rms-norm", "{} normalises over {}", user, list(shape))
        # Of the type it computes in: ATen accumulates 16-bit dtypes in float32, whose epsilon it takes.
        default = torch.finfo(torch.float32).eps
        return Norm(weight, float(default if eps is None else eps), 0.0, user, [user])
    return None


def _written_out(site: Site, words: Vocabulary) -> Norm | Refusal | None:
    for wide in (*(user for user in site.end.users if is_cast(user)), site.end):
        value = tensor_of(wide)
        if value is None or value.dtype != torch.float32:
            continue
        for scaled in wide.users:
            found = _scaled_by_rms(wide, scaled, words)
            if found is not None:
                eps, parts = found
                return _weighted(site, wide, scaled, eps, parts, words)
    return None


def _scaled_by_rms(wide: Node, scaled: Node, words: Vocabulary) -> tuple[float, list[Node]] | None:
    """(eps, nodes) when `scaled` is wide * rsqrt(mean(wide ** 2, -1, keepdim) + eps)."""
    product = words.plain(scaled, "mul")
    if product is None or wide not in product:
        return None
    rsqrt = product[1] if product[0] is wide else product[0]
    inverse = words.plain(rsqrt, "rsqrt")
    shifted = words.plain(inverse[0], "add") if inverse else None
    if shifted is None:
        return None
    mean, eps = shifted if isinstance(shifted[0], Node) else shifted[::-1]
    if not isinstance(mean, Node) or not isinstance(eps, (int, float)) or words.plain(mean, "mean") is None:
        return None
    square = words.plain(mean, "mean")[0]
    if not isinstance(square, Node) or tensor_of(square) is None:
        return None
    if not words.reduces(mean, tensor_of(square).dim() - 1, keepdim=True) or not words.squares(square, wide):
        return None
    return float(eps), [square, mean, inverse[0], rsqrt, scaled]


def _weighted(site: Site, wide: Node, scaled: Node, eps: float, parts: list[Node], words: Vocabulary) -> Norm | Refusal:
    """What follows the scaling: a weight, before or after the cast back to the sum's dtype."""
    total = tensor_of(site.end)
    chain = parts if wide is site.end else [wide, *parts]
    norm = Norm(None, eps, 0.0, scaled, chain)
    while len(norm.result.users) == 1:
        (reader,) = norm.result.users
        if is_cast(reader) and reader.args[:1] == (norm.result,):
            factor = None
        else:
            product = words.plain(reader, "mul")
            factors = [] if product is None else [f for f in product if f is not norm.result]
            factor = _weight(factors[0], words) if len(factors) == 1 and norm.weight is None else None
            if factor is None:
                break
            norm.weight, norm.offset, made = factor
            chain += made
        if tensor_of(reader) is None or tensor_of(reader).dtype not in (torch.float32, total.dtype):
            break
        chain.append(reader)
        norm.result = reader
    result = norm.result
    used = [user for part in chain if part is not result for user in part.users if user not in chain]
    if used:
        return Refusal("used-elsewhere", "the norm {} is read inside by {}", result, used[0])
    return norm


def _weight(factor: object, words: Vocabulary) -> tuple[Node, float, list[Node]] | None:
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
    # What others read too, such as a weight cast once for all, stays where it is and is read as it is.
    while isinstance(factor, Node) and is_cast(factor) and len(factor.users) == 1 and isinstance(factor.args[0], Node):
        made.insert(0, factor)
        factor = factor.args[0]
    value = tensor_of(factor)
    return None if value is None or value.dim() != 1 or not isinstance(factor, Node) else (factor, offset, made)
