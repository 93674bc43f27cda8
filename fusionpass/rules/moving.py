"""May what the graph reads in one place be read in another?"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch.fx import Node

from fusionpass.graph.effects import Effects
from fusionpass.graph.refusal import Refusal
from fusionpass.rules.site import Operand, Site

Reads = Iterable[tuple[str, Operand]]


def movable(reads: Reads, first: Node, now: Node, effects: Effects, own: Collection[Node] = ()) -> Refusal | None:
    """Whether the operands may be read at `now`.

    reads: the operands, by their names in sentences. first: the stage's first node. own: nodes of the stage itself; their
    writes move with them.
    """
    change = effects.state_change_between(first, now)
    if change is not None:
        return Refusal("state-change-between", "{} runs between {} and {}", change, first, now)
    for name, operand in reads:
        writer = effects.write_between(operand.value, operand.read, now, own)
        if writer is not None:
            return Refusal("mutation-between", "{} may write {} ({}) before {}", writer, name, operand.value, now)
        writer = effects.reshaped_by(operand.value)
        if writer is not None:
            return Refusal("metadata-mutation", "{} changes the shape of {} ({}) in place", writer, name, operand.value)
    return None


def site_movable(site: Site, now: Node, effects: Effects) -> Refusal | None:
    """Whether the site's op may stand at `now` instead of at its present place."""
    reads = ((operand.said or name, operand._replace(read=site.at)) for name, operand in site.operands.items())
    return movable(reads, site.at, now, effects)
