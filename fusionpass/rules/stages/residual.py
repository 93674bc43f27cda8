"""out = residual + sum: the add that follows the formula, through views that keep the rows' order, either way round.

h = sum.float() + residual.float(); residual = h.to(dtype)      serving engines: the next norm reads h, others the cast
residual += sum                                                 the op's result is copied into the residual's memory
residual + sum * residual_multiplier                            a number, granitemoe; `/ 2`, cohere2_moe
"""

from __future__ import annotations

from fusionpass.graph.effects import Effects
from fusionpass.graph.refusal import Refusal
from fusionpass.graph.vocabulary import Vocabulary
from fusionpass.rules.gated_add_core import find
from fusionpass.rules.rule import Stage
from fusionpass.rules.site import Site
from fusionpass.rules.stages import common, following_add


def grow(site: Site, words: Vocabulary, effects: Effects) -> Site | Refusal:
    """The site with the add, or why it stays outside."""
    following = following_add.following_add(site, words)
    if isinstance(following, Refusal):
        return following
    if following.other is None:
        return Refusal("not-a-residual", "{}", following.instead(words))
    if any(other is not None and other.node("a") is following.sum for other, _ in find(words, following.add)):
        return Refusal("another-sum", "{} adds a gated product of its own to {}", following.add, following.sum)
    added = following_add.added(site, following, effects, "residual")
    if isinstance(added, Refusal):
        return added
    return site.grown(
        "residual",
        after=added.parts,
        operands={"residual": added.operand},
        numbers={} if following.scale == 1 else {"scale": following.scale},
        results=[following.add],
        at=following.add,
        written_back="residual" if added.written else None,
        op=common.MOE_COMBINE,
    )


STAGE = Stage(
    name="residual",
    formula="out = residual + out",
    needs=(
        "the sum's only reader is an add, behind views that keep its rows apart, and at most products with numbers",
        "a residual of the shape and device of that add, which is contiguous",
        "no write to an operand of the formula before that add",
    ),
    codes=following_add.CODES
    | {
        "not-a-residual": "what reads the sum is no addition of another tensor",
        "another-sum": "what reads the sum is a site of its own, or nearly one, with the sum as its a",
    },
    grow=grow,
)
