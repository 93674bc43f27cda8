"""a = sum_k weights[t, k] * y[inverse[t, k]]: the weighted top-k sum of the experts' outputs is added up in the kernel.

Its spellings are in `fusionpass.rules.weighted_sum`.
"""

from __future__ import annotations

from fusionpass.graph.effects import Effects
from fusionpass.graph.refusal import Refusal
from fusionpass.graph.tensors import tensor_of
from fusionpass.graph.vocabulary import Vocabulary
from fusionpass.kernels.contract import MOST_COLUMNS, MOST_TOP_K
from fusionpass.rules.moving import movable
from fusionpass.rules.rule import Stage
from fusionpass.rules.site import Operand, Site
from fusionpass.rules.stages import common
from fusionpass.rules.weighted_sum import WeightedSum, fitted, weighted_sum, with_wide_weights


def grow(site: Site, words: Vocabulary, effects: Effects) -> Site | Refusal:
    """The site with the weighted sum in place of a, or why it stays outside."""
    refusal = common.combinable(site)
    if refusal is not None:
        return refusal
    found = weighted_sum(site.node("a"), words)
    if isinstance(found, Refusal):
        return found
    refusal = common.read_once(found.parts, site.anchor)
    checked = refusal or fitted(found, site.node("a"), site.anchor)
    if isinstance(checked, Refusal):
        return checked
    reads = [(operand.said or name, operand) for name, operand in checked.operands().items()]
    refusal = movable(reads, checked.parts[0], site.at, effects)
    if refusal is not None:
        return refusal
    wide = _with_wide_weights(site, checked, effects)
    return site.grown(
        "finalize", before=wide.parts, operands=wide.operands(), numbers=wide.numbers(), op=common.MOE_COMBINE
    )


def _with_wide_weights(site: Site, found: WeightedSum, effects: Effects) -> WeightedSum:
    """The sum with the weights as they were before a cast, where they can still be read."""
    wide = with_wide_weights(found, site.anchor)
    if wide is None:
        return found
    weights = wide.parts[0].args[0]
    moved = [("topk_weights", Operand(weights, wide.parts[0]))]
    if common.kinds(site.anchor, [("weights", tensor_of(weights))]) or movable(moved, wide.parts[0], site.at, effects):
        return found
    return wide


STAGE = Stage(
    name="finalize",
    formula="a = (weights[..., None] * y[inverse].view(*weights.shape, -1)).sum(-2)",
    needs=(
        "a sum over the last dim but one of a product with one weight per row",
        "views that keep the rows' order, and at most one gather of rows, in between",
        f"at most {MOST_TOP_K} terms and {MOST_COLUMNS} columns",
        "y and weights in bfloat16, float16 or float32",
    ),
    codes=common.CODES
    | {
        "not-a-finalize": "a is computed by something else",
        "used-elsewhere": "a node of the weighted sum has other readers, so it must stay",
        "top-k": "the number of terms is not a fixed number within the limit",
    },
    grow=grow,
)
