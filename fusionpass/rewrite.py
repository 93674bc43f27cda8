"""`rewrite(graph)`: the pass on a graph one already has, from any tracer; the graph given stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch.export import ExportedProgram
from torch.export.graph_signature import OutputSpec
from torch.fx import GraphModule

from fusionpass import collecting, notice
from fusionpass.copying import editable
from fusionpass.engine import Outcome, foreign_type, run
from fusionpass.options import Options
from fusionpass.report import Report
from fusionpass.tensors import value_of


class Rewritten(NamedTuple):
    """What `rewrite` returns: the new graph, of the type that was given, and the report on it."""

    graph_module: GraphModule | ExportedProgram
    report: Report


def rewrite(
    graph: GraphModule | ExportedProgram, example_inputs: Sequence[Any] | None = None, **options: Any
) -> Rewritten:
    """Swap every a + sigmoid(gate) * b of `graph` for one op, in a copy that shares its parameters.

    Args:
        graph: a `GraphModule` from Dynamo, `torch.export`, `make_fx`, AOTAutograd or `torch.fx.symbolic_trace`, or an
            `ExportedProgram`.
        example_inputs: one value per graph input, needed where the tracer recorded no shapes (`symbolic_trace`). They are
            read for shape, dtype, stride and device only; nothing runs on them.
        options: as for `fusionpass.fuse`.

    Returns:
        `Rewritten(graph_module, report)`.

    Raises:
        TypeError: `graph` is neither of the two.
        ValueError: no shapes and no `example_inputs`, or inputs that do not fit; an unknown option or value.
        NothingRewritten: under `strict`, when no site was rewritten.
    """
    chosen = Options.from_user(options)
    if example_inputs is not None and (isinstance(example_inputs, str) or not isinstance(example_inputs, Sequence)):
        kind = type(example_inputs).__name__
        raise TypeError(f"example_inputs is a {kind}: it takes a list or tuple with one value per input of the graph")
    if isinstance(graph, ExportedProgram):
        result, outcome = _rewrite_exported(graph, chosen)
    elif isinstance(graph, GraphModule):
        result = editable(graph)
        _ensure_shapes(result, example_inputs)
        outcome = run(result, chosen, foreign=foreign_type(example_inputs))
    else:
        raise TypeError(
            f"rewrite was given a {type(graph).__name__}: it takes a torch.fx.GraphModule or an ExportedProgram; "
            "trace the model first, or use fusionpass.explain"
        )
    with collecting.collector() as own:
        collecting.record(outcome, compiled=False)
    if not outcome.rewrites:
        notice.nothing(own.report.why_nothing(), chosen)
    return Rewritten(result, own.report)


def _ensure_shapes(graph_module: GraphModule, example_inputs: Sequence[Any] | None) -> None:
    """Have a recorded value on every node, from the tracer or by running the graph on fakes of `example_inputs`."""
    inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    calls = [node for node in graph_module.graph.nodes if node.op.startswith("call_")]
    if example_inputs is not None:
        required = sum(1 for node in inputs if not node.args)
        if not required <= len(example_inputs) <= len(inputs):
            names = ", ".join(node.name for node in inputs)
            raise ValueError(f"example_inputs has {len(example_inputs)} values, the graph takes {len(inputs)}: {names}")
    if not calls or any(value_of(node) is not None for node in calls):
        return
    if example_inputs is None:
        raise ValueError(
            "the graph has no recorded shapes, as torch.fx.symbolic_trace leaves it: pass rewrite(graph, example_inputs) "
            "with one value per input"
        )
    _propagate(graph_module, example_inputs)


def _propagate(graph_module: GraphModule, example_inputs: Sequence[Any]) -> None:
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    from fusionpass.private import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        FakeTensorProp(graph_module, mode).propagate(*example_inputs)
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"example_inputs do not fit the graph: {type(error).__name__}: {first_line}") from error


def _rewrite_exported(program: ExportedProgram, options: Options) -> tuple[ExportedProgram, Outcome]:
    """A new program around the rewritten graph; its signature follows outputs that were renamed."""
    graph_module = editable(program.graph_module)
    outcome = run(graph_module, options)
    signature = program.graph_signature
    if any(_output_name(spec) in outcome.renamed for spec in signature.output_specs):
        signature = copy.deepcopy(signature)
        for spec in signature.output_specs:
            if _output_name(spec) in outcome.renamed:
                spec.arg.name = outcome.renamed[_output_name(spec)]
    new_program = ExportedProgram(
        root=graph_module,
        graph=graph_module.graph,
        graph_signature=signature,
        state_dict=program.state_dict,
        range_constraints=dict(program.range_constraints),
        module_call_graph=list(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )
    return new_program, outcome


def _output_name(spec: OutputSpec) -> str | None:
    """The node an output stands for, None for a constant."""
    return getattr(spec.arg, "name", None)
