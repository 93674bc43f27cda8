"""What PyTorch's own tools see of the pass: counters, the structured trace of tlparse, bisecting and switching off."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch.fx import GraphModule

from fusionpass.report.records import Outcome

NAME = "fusionpass"  # of the pass, the counters and the artefact
Result = TypeVar("Result")


def as_named_pass(graph_module: GraphModule, work: Callable[[GraphModule], Result]) -> Result | None:
    """Run `work` on the graph, as a pass that Inductor's tools know by name; None if they have switched it off.

    `torch._inductor.config.disabled_passes` may name the pass. The compiler bisector counts it among the pre-grad
    passes. Its time is `pass.pre_grad_passes.fusionpass` in Dynamo's table of compile times.
    """
    from torch.fx.passes.graph_transform_observer import GraphTransformObserver

    return GraphTransformObserver(graph_module, NAME, "pre_grad_passes").apply_gm_pass(work)


def tell(outcome: Outcome) -> None:
    """Count one graph's rewrites and misses, and leave them in the structured trace of the compilation, if one is kept."""
    from fusionpass.private import counters, trace_structured

    found = counters[NAME]
    found["graphs"] += 1
    found["rewrites"] += len(outcome.rewrites)
    found["misses"] += len(outcome.misses)
    for miss in outcome.misses:
        found[f"miss {miss.code}"] += 1
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"{NAME}_report", "encoding": "json"},
        payload_fn=lambda: {
            "rewrites": [rewrite.to_dict() for rewrite in outcome.rewrites],
            "misses": [miss.to_dict() for miss in outcome.misses],
        },
        expect_trace_id=False,
    )
