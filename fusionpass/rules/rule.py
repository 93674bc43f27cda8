"""What a rule is: a core formula, the stages by which it grows, and the op that takes their place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch.fx import Node

from fusionpass.graph.effects import Effects
from fusionpass.graph.refusal import Refusal
from fusionpass.graph.vocabulary import OPERATIONS, Vocabulary
from fusionpass.private import OpOverload
from fusionpass.rules.replacement import Op
from fusionpass.rules.site import Site

Reading = tuple[Site | None, Refusal | None]
Guard = Callable[[Site, Effects], Refusal | None]


def no_saving(site: Site, tuned: bool) -> float:
    return 0.0


@dataclass(frozen=True)
class Stage:
    """A neighbour that the same op can compute as well.

    Attributes:
        name: its name in reports, in the option `rules` and in `fusionpass rules`.
        formula: what it computes, as `name = expression`, in functions of torch and torch.nn.functional. The stage
            takes this program in if a rule's formula stands around it. The name of a core's result is `out`.
        needs: what must hold around it, in words for people.
        codes: refusal code -> what it means.
        grow: takes a site and returns the larger one (see `Site.grown`), or why the stage stays outside.
        saves: microseconds that the stage saves Inductor, for a site that has the stage. It is told whether Inductor tunes.
        yields: its codes that say that what follows the site is not its own. They are no news where a later stage takes it.
        of: names of the rules that it grows from. Needed only if the stage is given to the option `rules` by itself.
        version: raise it if the op's result changes and the modules of the functions given here do not. PyTorch's
            caches then treat their old entries as stale.
    """

    name: str
    formula: str
    needs: tuple[str, ...]
    codes: Mapping[str, str] = field(hash=False)
    grow: Callable[[Site, Vocabulary, Effects], Site | Refusal]
    saves: Callable[[Site, bool], float] = no_saving
    yields: tuple[str, ...] = ()
    of: tuple[str, ...] = ()
    version: str = ""

    kind = "stage"

    def __post_init__(self) -> None:
        _as_tuples(self, "needs", "yields", "of")

    def __repr__(self) -> str:
        return f"Stage({self.name!r})"


def other_bits(site: Site) -> Refusal | None:
    """For rules whose op rounds differently from the nodes, for any operands."""
    return Refusal("numerics-eager", "numerics 'eager' keeps {} as it is: the op rounds differently", site.anchor)


def same_bits(site: Site) -> Refusal | None:
    """For rules whose op gives the same bits as the nodes."""
    return None


@dataclass(frozen=True)
class Rule:
    """A core formula, and the neighbours that one op may compute with it.

    Attributes:
        name, needs, codes, saves, version: as in a `Stage`.
        formula: what it computes, as an expression. The rule rewrites this program.
        op: what a site becomes, unless a stage gives it another op.
        anchors: the operations at which a reading begins: words of `fusionpass.graph.vocabulary`, in-place forms with
            a trailing underscore, or torch's own names of other operations ("silu").
        find: all ways to read such a node as the formula, best first, each with what stands in the way (None: nothing). A
            reading that is no site but should be reported is None with its refusal.
        guards: questions about a reading, in this order. The first refusal is reported. `fusionpass.rules.GUARDS` are those
            that any rule needs.
        bits: asked if the option `numerics` is "eager": why the op would give other bits than the nodes.
        stages: its stages, in the order in which they are tried.
        absent: what a report says if the graph has no reading at all.
    """

    name: str
    formula: str
    needs: tuple[str, ...]
    codes: Mapping[str, str] = field(hash=False)
    op: Op
    anchors: tuple[str, ...]
    find: Callable[[Vocabulary, Node], Iterable[Reading]]
    guards: tuple[Guard, ...]
    bits: Callable[[Site], Refusal | None] = other_bits
    stages: tuple[Stage, ...] = ()
    saves: Callable[[Site, bool], float] = no_saving
    absent: str = ""
    version: str = ""

    kind = "rule"

    def __post_init__(self) -> None:
        _as_tuples(self, "needs", "anchors", "guards", "stages")
        if isinstance(self.op, OpOverload):
            object.__setattr__(self, "op", Op(self.op))
        if not self.absent:
            object.__setattr__(self, "absent", f"nothing computes {self.formula}")

    def __repr__(self) -> str:
        return f"Rule({self.name!r})"

    @cached_property
    def begins_at(self) -> frozenset[str]:
        return frozenset(self.anchors)

    @cached_property
    def has_other_words(self) -> bool:
        """Whether a reading may begin at operations for which the vocabulary has no word."""
        return not self.begins_at <= OPERATIONS


def _as_tuples(value: Rule | Stage, *names: str) -> None:
    """Make lists tuples: rules are compared and hashed, since torch.compile guards on the options that hold them."""
    for name in names:
        given = getattr(value, name)
        object.__setattr__(value, name, (given,) if isinstance(given, str) else tuple(given))
