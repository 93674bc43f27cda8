"""out = rms_norm(out): the norm between a sparse layer and the residual add, in models that have one on either side.

    residual + post_norm(routed + shared)            afmoe, axk1, flex_olmo, gemma4, kolibri1

The sum itself is then nobody's any more: it joins only where the norm alone reads it.
"""

from __future__ import annotations

from fusionpass.graph.effects import Effects
from fusionpass.graph.nodes import readers
from fusionpass.graph.refusal import Refusal
from fusionpass.graph.tensors import same_sizes, tensor_of
from fusionpass.graph.vocabulary import Vocabulary
from fusionpass.rules import norms
from fusionpass.rules.moving import movable, site_movable
from fusionpass.rules.norms import no_norm, norm_of, unfit
from fusionpass.rules.rule import Stage
from fusionpass.rules.site import Operand, Site
from fusionpass.rules.stages import common, following_add


def grow(site: Site, words: Vocabulary, effects: Effects) -> Site | Refusal:
    """The site with the norm, or why it stays outside."""
    refusal = common.combinable(site)
    if refusal is not None:
        return refusal
    end, views = following_add.handed_on(site.end)
    norm = norm_of(end, tensor_of(end).dtype, words, effects)
    if norm is None:
        return no_norm(end, words)
    if isinstance(norm, Refusal):
        return norm
    behind, _ = following_add.handed_on(norm.result)
    if [words.operation(reader) for reader in readers(behind)] not in (["add"], ["add_"]):
        return Refusal("not-a-post-norm", "no add follows the norm {}", norm.result)
    others = [reader for reader in readers(end) if reader not in norm.parts]
    if others:
        return Refusal("used-elsewhere", "{} is read by {} too", end, others[0])
    if not same_sizes(tensor_of(end).shape[-1:], tensor_of(site.end).shape[-1:]):
        return Refusal("shape", "{} cuts the rows of {}", end, site.end)
    refusal, weight = unfit(norm, tensor_of(end), words), words.tensor(norm.weight)
    if refusal is None and weight is not None:
        refusal = common.kinds(site.anchor, [("the norm's weight", weight)])
    refusal = refusal or site_movable(site, norm.result, effects)
    weights = {} if norm.weight is None else {"post_norm_weight": Operand(norm.weight, norm.weight_read)}
    reads = [("the norm's weight", read) for read in weights.values()]
    refusal = refusal or movable(reads, site.at, norm.result, effects, norm.parts)
    if refusal is not None:
        return refusal
    return site.grown(
        "post_norm",
        after=[*views, *norm.parts],
        operands=weights,
        numbers={"post_eps": norm.eps, "post_offset": norm.offset},
        results=[norm.result],
        at=norm.result,
        op=common.MOE_COMBINE,
    )


STAGE = Stage(
    name="post_norm",
    formula="out = out * rsqrt(mean(out ** 2, -1, keepdim=True) + eps) * (offset + weight)",
    needs=(
        "an RMSNorm over the last dim of the sum, torch's own or written out, which nothing else reads",
        "a weight of one number per column, in the sum's dtype or float32, and a number added to it, or neither",
        "a result that is added to a residual",
    ),
    codes=common.CODES | common.YIELDED | norms.CODES | {"not-a-post-norm": "what reads the norm is no addition"},
    grow=grow,
    yields=("not-an-rms-norm", "not-a-post-norm", "used-elsewhere"),
)
