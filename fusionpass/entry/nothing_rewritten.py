"""A run that rewrites nothing always says so: one warning with the top reasons, or `NothingRewritten` under `strict`.

The owner of the outermost call (`fuse`, `explain`) waits until it returns, and judges it by the graphs that ran in it,
compiled then or earlier. The plain backend sees one graph at a time, while that graph is compiled. If Dynamo splits a
model, the backend cannot know which graph is the last one. So a piece of a split model only warns there, and never
raises.

A warning is given once per function and kind of reason. The kind is the codes, with the source lines of the sums; names of
nodes and sizes do not count. After `torch._dynamo.reset()` warnings are given again. In a distributed run only rank 0 warns.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from fusionpass.entry import collecting
from fusionpass.entry.calls import PLAIN, REWRITTEN, local
from fusionpass.entry.compiled_function import Place, name_of
from fusionpass.entry.no_graph import called, why_unseen
from fusionpass.errors import NothingRewritten, VerificationFailed
from fusionpass.options import Options
from fusionpass.report import Report
from fusionpass.report.records import Outcome

log = logging.getLogger("fusionpass")
_said: set[Hashable] = set()
_with_sites: set[Hashable] = set()  # functions given to torch.compile that had a graph rewritten


def forget() -> None:
    """Forget which warnings were given. `torch._dynamo.reset()` calls this, and after it everything is compiled again."""
    _said.clear()
    _with_sites.clear()


def after_graph(outcome: Outcome, options: Options, place: Place) -> None:
    """Called once per graph the backend compiles.

    Raises:
        NothingRewritten: under `strict`, for a graph that is a whole model by itself.
    """
    local.state.compiled += 1
    if local.state.owned:
        return
    if outcome.rewrites:
        _with_sites.add(place.function)
        return
    message = _report([outcome]).why_nothing()
    if not place.piece:
        nothing(message, options, (place.function, _kind([outcome])))
    elif place.function not in _with_sites:
        _say(
            f"{message}; it is one graph of a model that runs as several, so others may hold sites",
            (place.function, "piece"),
        )


def nothing(message: str, options: Options, key: Hashable = None) -> None:
    """Say that nothing was rewritten, in the way that the options ask for. A warning is given once per key, or each time if
    the key is None."""
    if options.strict:
        raise NothingRewritten(f"{message} (option 'strict' is on)")
    _say(message, key)


def _say(message: str, key: Hashable) -> None:
    if key is not None:
        if key in _said:
            return
        _said.add(key)
    log.log(logging.WARNING if _rank() == 0 else logging.DEBUG, "%s", message)


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def _report(outcomes: list[Outcome]) -> Report:
    report = Report()
    for outcome in outcomes:
        report.add(outcome, compiled=True)
    return report


def _kind(outcomes: list[Outcome]) -> Hashable:
    """What two refusals must have in common to be the same for a reader."""
    if any(outcome.switched_off for outcome in outcomes):
        return "switched off"
    return frozenset((miss.code, miss.source) for outcome in outcomes for miss in outcome.misses)


@dataclass
class Owned:
    """A compiled callable whose outermost calls we see. Each call is judged when it returns, by the graphs that ran in
    it."""

    run: Callable[..., Any]
    options: Options
    rewritten: bool = False  # some call ran a rewritten site
    told: set[Hashable] = field(default_factory=set)
    judged: dict[int, Outcome] = field(default_factory=dict)  # outcomes of graphs that run repeatedly without a site

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        here = local.state
        if here.owned:  # inside another owned call, which is judged for both
            return self.run(*args, **kwargs)
        before, here.ran, here.owned = here.ran, 0, True
        try:
            result = self.run(*args, **kwargs)
        except Exception as error:
            inner = getattr(error, "inner_exception", None)  # of Dynamo's BackendCompilerFailed
            if isinstance(inner, VerificationFailed):  # a result of the pass, not a failure of a compiler
                raise inner from None
            raise
        finally:
            here.owned = False
            ran, here.ran = here.ran, here.ran | before
            refused = here.refused
            if refused:
                here.refused = []
        if ran == REWRITTEN:
            self.rewritten = True
        else:
            self._judge(ran, refused, args, kwargs, result)
        return result

    def _judge(self, ran: int, refused: list[Outcome], args: Any, kwargs: Any, result: Any) -> None:
        """A call in which no rewritten site ran."""
        if ran != PLAIN:
            self._unseen(args, kwargs, result)
            return
        if not self.options.strict and all(id(outcome) in self.judged for outcome in refused):
            return
        distinct = {id(outcome): outcome for outcome in refused}
        self.judged |= distinct
        outcomes = list(distinct.values())
        lost = any(outcome.misses or outcome.switched_off for outcome in outcomes)
        if self.rewritten and not lost and not self.options.strict:
            return  # other calls have sites, and this one never had one, such as a dense layer of the same class
        self._say(lambda: _report(outcomes).why_nothing(), _kind(outcomes), args)

    def _unseen(self, args: Any, kwargs: Any, result: Any) -> None:
        """A call in which no graph ran at all."""
        why = why_unseen(self.run, args, kwargs, result)
        collecting.no_graph(why.sentence)
        if self.options.strict and inspect.iscoroutine(result):
            result.close()  # nobody will await it
        if why.code != "empty" or not self.rewritten or self.options.strict:
            self._say(lambda: why.sentence, why.code, args)

    def _say(self, message: Callable[[], str], kind: Hashable, args: Any) -> None:
        """See `nothing`. A message that was given for this callable is not put together again: it may be called very
        often."""
        if self.options.strict or kind not in self.told:
            self.told.add(kind)
            nothing(message(), self.options, (name_of(*called(self.run, args)), kind))
