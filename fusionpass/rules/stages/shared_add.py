"""out = routed + shared: the shared expert that has no gate, either way round.

    out = routed + shared                                            DeepSeek, GLM, Ernie, Hunyuan, dots1
    out = routed * routed_scaling_factor + shared

What is added is taken for the shared expert where nobody else reads it. A residual is also read by the norm in front.
"""

from __future__ import annotations

from torch.fx import Node

from fusionpass.graph.effects import Effects
from fusionpass.graph.nodes import is_cast, is_reshape, readers
from fusionpass.graph.refusal import Refusal
from fusionpass.graph.vocabulary import Vocabulary
from fusionpass.rules.rule import Stage
from fusionpass.rules.site import Site
from fusionpass.rules.stages import common, following_add


def grow(site: Site, words: Vocabulary, effects: Effects) -> Site | Refusal:
    """The site with the add, or why it stays outside."""
    following = following_add.following_add(site, words)
    if isinstance(following, Refusal):
        return following
    if following.other is None:
        return Refusal("not-a-shared-add", "{}", following.instead(words))
    added = following_add.added(site, following, effects, "shared expert")
    if isinstance(added, Refusal):
        return added
    if not _read_once(added.other):
        return Refusal("not-a-shared-add", "{} adds {}, which others read too", following.add, added.other)
    if added.written:
        return Refusal("in-place", "{} overwrites {}", following.add, added.other)
    return site.grown(
        "shared_add",
        after=added.parts,
        operands={"b": added.operand},
        numbers={} if following.scale == 1 else {"routed_scale": following.scale},
        results=[following.add],
        at=following.add,
        op=common.MOE_COMBINE,
    )


def _read_once(node: Node) -> bool:
    """Whether a value, and what it is a view or a cast of, has one reader."""
    while len(readers(node)) == 1 and (is_reshape(node) or is_cast(node)) and isinstance(node.args[0], Node):
        node = node.args[0]
    return len(readers(node)) == 1


STAGE = Stage(
    name="shared_add",
    formula="out = out + shared",
    needs=(
        "the sum's only reader is an add, behind views that keep its rows apart, and at most products with numbers",
        "another tensor of the shape and device of that add, which nobody else reads; a result that is contiguous",
        "no write to an operand before that add",
    ),
    codes=following_add.CODES
    | common.YIELDED
    | {"not-a-shared-add": "what reads the sum is no addition of another tensor that nobody else reads"},
    grow=grow,
    yields=("not-a-shared-add", "used-elsewhere"),
)
