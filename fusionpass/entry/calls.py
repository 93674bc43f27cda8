"""What runs in a call: each compiled graph notes, as it runs, whether it holds a rewritten site.

Past its recompile limit, or when it skips a function, Dynamo runs the function as it was written, and tells nobody.
This module knows for each thread what did run: if no graph ran in an owned call (see `notice`) or a block of `collect`,
nothing was fused. A note costs a tenth of a microsecond per graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any

from fusionpass.private import _LazyGraphModule
from fusionpass.report.records import Outcome

PLAIN = 1  # a graph without a rewritten site ran
REWRITTEN = 3  # one with a site ran; it holds the bit of a graph that ran


class State:
    """The state of one thread."""

    __slots__ = ("compiled", "owned", "ran", "refused")

    def __init__(self) -> None:
        self.owned = False  # inside of an owned call
        self.ran = 0  # PLAIN and REWRITTEN, since somebody last set it to 0
        self.compiled = 0  # graphs given to the inner compiler so far
        self.refused: list[Outcome] = []  # of the graphs without a site that ran inside of the owned call


class _Local(threading.local):
    def __init__(self) -> None:
        self.state = State()


local = _Local()


def noting(compiled: Callable[..., Any], outcome: Outcome) -> Callable[..., Any]:
    """`compiled` with a note of each run. It is returned unchanged if it must keep torch's own type, to be written to a
    file."""
    if hasattr(type(compiled), "serialize_compile_artifacts") and not local.state.owned:
        return compiled
    compiled = _generated(compiled)
    if outcome.rewrites:

        def noted(*args: Any) -> Any:
            local.state.ran = REWRITTEN
            return compiled(*args)

    else:

        def noted(*args: Any) -> Any:
            here = local.state
            here.ran |= PLAIN
            if here.owned:
                here.refused.append(outcome)
            return compiled(*args)

    if isinstance(compiled, FunctionType):  # AOTAutograd keeps there how to write it to a file
        noted.__dict__.update(compiled.__dict__)
    return noted


def _generated(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The graph's own code. Without this, `compiled` would generate it at the first call and look it up at each: 3 us
    of CPU."""
    graph_module = getattr(compiled, "__self__", None)
    if isinstance(graph_module, _LazyGraphModule) and compiled.__name__ == "_lazy_forward":
        _LazyGraphModule.force_recompile(graph_module)
        return graph_module.forward
    return compiled
