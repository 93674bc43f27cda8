"""`rewrite(graph)`: the pass on a graph that you already have, from any tracer. Your graph is not changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch.export import ExportedProgram
from torch.fx import GraphModule

from fusionpass.engine import foreign_type, run
from fusionpass.entry import collecting, nothing_rewritten
from fusionpass.entry.exported import rewrite_exported
from fusionpass.graph.copying import editable
from fusionpass.graph.gradients import as_in_training
from fusionpass.graph.shapes import ensure_shapes
from fusionpass.options import Options
from fusionpass.report import Report


class Rewritten(NamedTuple):
    """What `rewrite` returns: the new graph, of the same type as the given one, and the report on it."""

    graph_module: GraphModule | ExportedProgram
    report: Report


def rewrite(
    graph: GraphModule | ExportedProgram, example_inputs: Sequence[Any] | None = None, **options: Any
) -> Rewritten:
    """Swap every a + sigmoid(gate) * b of `graph` for one op, in a copy that shares its parameters.

    Args:
        graph: a `GraphModule` from Dynamo, `torch.export`, `make_fx`, AOTAutograd or `torch.fx.symbolic_trace`, or an
            `ExportedProgram`.
        example_inputs: one value per graph input, needed if the graph has no recorded shapes (`symbolic_trace` records none;
            `FakeTensorProp` and `ShapeProp` do). Only shape, dtype, stride, device and `requires_grad` are read. The
            graph runs once on fakes of the inputs, with fake copies of the parameters, buffers and leaf modules.
        options: as for `fusionpass.fuse`.

    Returns:
        `Rewritten(graph_module, report)`.

    Raises:
        TypeError: `graph` is neither of the two.
        ValueError: no shapes and no `example_inputs`, or inputs that do not fit; an unknown option or value.
        NothingRewritten: under `strict`, if no site was rewritten.
    """
    chosen = Options.from_user(options)
    if example_inputs is not None and (isinstance(example_inputs, str) or not isinstance(example_inputs, Sequence)):
        kind = type(example_inputs).__name__
        raise TypeError(f"example_inputs is a {kind}: it takes a list or tuple with one value per input of the graph")
    if isinstance(graph, ExportedProgram):
        result, outcome = rewrite_exported(graph, chosen)
    elif isinstance(graph, GraphModule):
        result = editable(graph)
        ensure_shapes(result, example_inputs)
        with as_in_training(result, example_inputs or ()):
            outcome = run(result, chosen, foreign=foreign_type(example_inputs))
    else:
        raise TypeError(
            f"rewrite was given a {type(graph).__name__}: it takes a torch.fx.GraphModule or an ExportedProgram; "
            "trace the model first, or use fusionpass.explain"
        )
    with collecting.collector() as own:
        collecting.record(outcome, compiled=False)
    if not outcome.rewrites:
        nothing_rewritten.nothing(own.report.why_nothing(), chosen)
    return Rewritten(result, own.report)
