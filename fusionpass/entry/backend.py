"""`torch.compile(model, backend="fusionpass")`: rewrite Dynamo's graph, then hand it to the inner compiler.

The backend function rewrites the graph before the inner compiler gets it. So the report is complete on a warm cache
too, where the backend still runs and passes inside Inductor do not. Training works, and the caches key on the rewritten
graph.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule

from fusionpass.engine import foreign_type, run
from fusionpass.entry import collecting, nothing_rewritten
from fusionpass.entry.calls import noting
from fusionpass.entry.compiled_function import place_of
from fusionpass.entry.inner_compiler import Compiled, compile_inner, inductor_settings, tunes
from fusionpass.entry.instrumentation import as_named_pass, tell
from fusionpass.operators.functions import call_directly
from fusionpass.operators.in_inductor import ops_opened
from fusionpass.options import Options
from fusionpass.report.records import GraphBreak, Outcome


def fusionpass(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """The backend registered under the name "fusionpass". Users give the name, and `torch.compile` calls it.

    Args:
        graph_module: Dynamo's graph, rewritten in place.
        example_inputs: its inputs.
        mode: an Inductor mode ("reduce-overhead", "max-autotune", ...). torch.compile does not take `mode` and `options`
            together. If you need both, use the option `mode`.
        options: the options of `fusionpass.fuse`; here `inner` defaults to "inductor".

    Raises:
        ValueError: an unknown option, value or mode.
    """
    given = dict(options or {})
    if mode is not None:
        given["mode"] = mode
    return compile_graph(graph_module, example_inputs, Options.from_user(given, default_inner="inductor"))


fusionpass.reset = nothing_rewritten.forget  # torch._dynamo.reset() calls it


@dataclass(frozen=True)
class Backend:
    """The backend as an object. Equal options make equal backends, so N decorated layers share one compilation."""

    options: Options

    def __call__(self, graph_module: GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        return compile_graph(graph_module, example_inputs, self.options)

    def reset(self) -> None:
        """Called by `torch._dynamo.reset()`."""
        nothing_rewritten.forget()


def compile_graph(graph_module: GraphModule, example_inputs: Sequence[Any], options: Options) -> Compiled:
    tuned = options.inner == "inductor" and tunes(inductor_settings(options))
    foreign = foreign_type(example_inputs)
    outcome, ran = passed_over(graph_module, lambda gm: run(gm, options, foreign=foreign, tuned=tuned))
    nothing_rewritten.after_graph(outcome, options, place_of(graph_module))
    if options.inner == "eager" and outcome.rewrites:
        call_directly(graph_module)
    try:
        with ops_opened(options.inner == "inductor"):
            compiled = compile_inner(graph_module, example_inputs, options, rewritten=bool(outcome.rewrites))
    except Exception as error:
        if hasattr(error, "add_note"):
            error.add_note(f"raised by the inner compiler of fusionpass, option inner={options.inner!r}")
        raise
    return collecting.counted(noting(compiled, outcome), ran)


def passed_over(
    graph_module: GraphModule, work: Callable[[GraphModule], Outcome]
) -> tuple[Outcome, Callable[[], None] | None]:
    """Run the pass `work` on a graph of Dynamo's, and tell PyTorch's tools and the active reports.

    Returns the outcome, and what to call on each run of the graph.
    """
    code_before = graph_module.print_readable(print_output=False) if collecting.wants_code() else None
    outcome = as_named_pass(graph_module, work)
    if outcome is None:  # torch._inductor.config.disabled_passes, or the bisector
        outcome = Outcome(len(graph_module.graph.nodes), switched_off=True)
    tell(outcome)
    code = (code_before, graph_module.print_readable(print_output=False)) if code_before is not None else None
    ran = collecting.record(outcome, compiled=True, graph_break=_graph_break(graph_module), code=code)
    return outcome, ran


def _graph_break(graph_module: GraphModule) -> GraphBreak | None:
    """Where and why Dynamo ended this graph early; None if the graph ends with the function."""
    reason = getattr(graph_module, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    frame = reason.user_stack[-1] if reason.user_stack else None
    source = f"{os.path.basename(frame.filename)}:{frame.lineno}" if frame is not None else ""
    title, *details = [line.strip() for line in str(reason.reason).strip().splitlines()] or ["unknown"]
    explanation = [line.removeprefix("Explanation: ") for line in details if line.startswith("Explanation: ")]
    return GraphBreak(": ".join([title, *explanation]), source)
