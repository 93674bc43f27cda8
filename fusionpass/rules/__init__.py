"""The rules, in the order in which they are tried, and what a package needs to bring one of its own.

    from fusionpass.rules import GUARDS, Op, Operand, Refusal, Rule, RULES, Site

    SQUARED_RELU = Rule(name="squared_relu", formula="relu(x) ** 2", ..., op=Op(torch.ops.mine.squared_relu.default), ...)
    fusionpass.fuse(model, rules=[*RULES, SQUARED_RELU])

A rule finds sites, asks its guards about them, and grows them by its stages. The engine does the rest: it puts the op in the
place of the nodes, checks it (`verify`), and reports. `examples/own_rule.py` is a whole rule. A `Stage` that is given by
itself joins the rules that its `of` names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from fusionpass.graph.effects import Effects
from fusionpass.graph.identity import torch_name
from fusionpass.graph.nodes import readers
from fusionpass.graph.refusal import Refusal
from fusionpass.graph.tensors import tensor_of
from fusionpass.graph.vocabulary import Vocabulary
from fusionpass.rules import finalize, gated_add
from fusionpass.rules.guards import CODES, GUARDS
from fusionpass.rules.moving import movable, site_movable
from fusionpass.rules.replacement import Op
from fusionpass.rules.rule import Rule, Stage, other_bits, same_bits
from fusionpass.rules.site import Operand, Site

__all__ = [
    "CODES",
    "GUARDS",
    "RULES",
    "Effects",
    "Op",
    "Operand",
    "Refusal",
    "Rule",
    "Site",
    "Stage",
    "Vocabulary",
    "movable",
    "other_bits",
    "readers",
    "same_bits",
    "site_movable",
    "tensor_of",
    "torch_name",
]

# Where two could take the same nodes, the earlier one does.
RULES: tuple[Rule, ...] = (gated_add.RULE, finalize.RULE)


class Chosen(NamedTuple):
    """A rule that the option `rules` allows, with its stages."""

    rule: Rule
    stages: tuple[Stage, ...]  # also those that are left out
    left_out: frozenset[str]


def catalog(rules: Iterable[Rule] = RULES) -> tuple[Rule | Stage, ...]:
    """Every rule and its stages, each once."""
    return tuple(dict.fromkeys(each for rule in rules for each in (rule, *rule.stages)))


def checked(given: Any) -> tuple[str | Rule | Stage, ...] | None:
    """The option `rules`, checked. The names of our stages come last, in our order.

    Raises:
        TypeError: it is not a list of names and rules.
        ValueError: an unknown name, two rules with one name, no rule at all, a stage whose rule is left out.
    """
    if given is None:
        return None
    listed = isinstance(given, Collection) and not isinstance(given, str | Mapping)
    if not listed or not all(isinstance(each, str | Rule | Stage) for each in given):
        raise TypeError(f"option 'rules' is {given!r}: it takes a list of names, such as ['{RULES[0].name}'], or rules")
    given = tuple(dict.fromkeys(given))
    known = [each.name for each in catalog()]
    for name in given:
        if isinstance(name, str) and name not in known:
            raise ValueError(f"option 'rules' names {name!r}: allowed are {', '.join(known)}")
    names = [each.name for each in _rules(given)]
    ours = [rule.name for rule in RULES]
    if not names:
        raise ValueError(
            f"option 'rules' is {list(given)!r} without {' or '.join(map(repr, ours))}, the core every stage grows from"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"option 'rules' is {list(given)!r}: two of the rules have the same name")
    for stage in given:
        if isinstance(stage, Stage) and not set(stage.of) & set(names):
            grows = " or ".join(map(repr, stage.of)) or "no rule: name one in its `of`"
            raise ValueError(f"option 'rules' has the stage {stage.name!r} without what it grows from, {grows}")
    return tuple(
        sorted(given, key=lambda each: known.index(each) if isinstance(each, str) and each not in ours else -1)
    )


@lru_cache(maxsize=256)
def chosen(given: tuple[str | Rule | Stage, ...] | None) -> tuple[Chosen, ...]:
    """The rules that the checked option allows, in the order of the list. They are tried in this order."""
    if given is None:
        return tuple(Chosen(rule, rule.stages, frozenset()) for rule in RULES)
    found = []
    added = [stage for stage in given if isinstance(stage, Stage)]
    for rule in _rules(given):
        whole = rule in given
        left_out = frozenset() if whole else frozenset(stage.name for stage in rule.stages if stage.name not in given)
        stages = (*rule.stages, *(stage for stage in added if rule.name in stage.of and stage not in rule.stages))
        found.append(Chosen(rule, stages, left_out - {stage.name for stage in added}))
    return tuple(found)


def own(given: tuple[str | Rule | Stage, ...] | None) -> Iterator[Rule | Stage]:
    """The rules and stages of the checked option that are not ours."""
    ours = catalog()
    for each in given or ():
        if not isinstance(each, str) and each not in ours:
            yield from catalog([each]) if isinstance(each, Rule) else [each]


def _rules(given: Iterable[str | Rule | Stage]) -> list[Rule]:
    ours = {rule.name: rule for rule in RULES}
    found = (ours.get(each) if isinstance(each, str) else each for each in given)
    return list(dict.fromkeys(each for each in found if isinstance(each, Rule)))
