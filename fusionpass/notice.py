"""Zero rewrites is never silent: one warning with the top reasons, or `NothingRewritten` under `strict`.

Who owns the outermost call (`fuse`, `explain`) waits until it returns and speaks once, over all graphs it compiled. The
plain backend sees one graph at a time and cannot know which is the last of a model that Dynamo splits, so there a piece
of a split model only warns, once per reason, and never raises.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fusionpass.engine import Outcome
from fusionpass.errors import NothingRewritten, VerificationFailed
from fusionpass.options import Options
from fusionpass.report import Report

log = logging.getLogger("fusionpass")


class _Owner(threading.local):
    """Per thread: what has been compiled under the outermost owned call; None outside of one."""

    report: Report | None = None


_owner = _Owner()
_said: set[str] = set()


def after_graph(outcome: Outcome, options: Options, *, piece: bool) -> None:
    """Called once per graph the backend compiles; `piece` when the graph is part of a model that Dynamo split.

    Raises:
        NothingRewritten: under `strict`, for a graph that is a whole model by itself.
    """
    if _owner.report is not None:
        _owner.report.add(outcome, compiled=True)
        return
    if outcome.rewrites:
        return
    report = Report()
    report.add(outcome, compiled=True)
    message = report.why_nothing()
    if not piece:
        nothing(message, options)
    elif message not in _said:
        _said.add(message)
        log.warning("%s; a graph break split the model, so its other graphs may hold sites", message)


def nothing(message: str, options: Options) -> None:
    """Say that nothing was rewritten, by the means the options ask for."""
    if options.strict:
        raise NothingRewritten(f"{message} (option 'strict' is on)")
    log.warning("%s", message)


@dataclass
class Owned:
    """A compiled callable whose outermost calls we see: it speaks once per call that compiled, not once per graph."""

    run: Callable[..., Any]
    options: Options
    rewritten: int = 0
    complaint: str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.complaint is not None:  # strict: a second call would run the cached, unfused graph in silence
            raise NothingRewritten(self.complaint)
        if _owner.report is not None:  # inside another owned call, which speaks for both
            return self.run(*args, **kwargs)
        report = _owner.report = Report()
        try:
            result = self.run(*args, **kwargs)
        except Exception as error:
            inner = getattr(error, "inner_exception", None)  # of Dynamo's BackendCompilerFailed
            if isinstance(inner, VerificationFailed):  # the pass's finding, no compiler's failure
                raise inner from None
            raise
        finally:
            _owner.report = None
        if report.graphs:
            self.settle(report)
        return result

    def settle(self, report: Report) -> None:
        """Judge what was compiled; see `nothing`."""
        self.rewritten += len(report.rewrites)
        if self.rewritten:
            return
        try:
            nothing(report.why_nothing(), self.options)
        except NothingRewritten as error:
            self.complaint = str(error)
            raise
