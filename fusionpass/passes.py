"""The pass in other people's pipelines: as a `PassBase` of torch.fx, and as a custom pass inside Inductor.

    PassManager(passes=[..., Pass(numerics="eager"), ...])
    torch.compile(model, options={"post_grad_custom_pre_pass": InductorPass(after=their_pass)})

Prefer `backend="fusionpass"` if you can choose. It sees the model as it is written. It runs on a warm cache too, so its
report is complete. And with it Inductor launches the kernels itself. `InductorPass` is for a stack that owns the call
of torch.compile and its backend. It sees one aten graph per forward, and none where a cache is hit. Its ops stay calls
through the dispatcher, which cost CPU time unless CUDA graphs replay them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fusionpass.engine import run
from fusionpass.entry import collecting
from fusionpass.entry.cache_key import digest
from fusionpass.entry.rewrite import rewrite
from fusionpass.options import Options
from fusionpass.private import CustomGraphPass
from fusionpass.report import Report
from fusionpass.rules import own


class Pass(PassBase):
    """`fusionpass.rewrite` as a pass of `torch.fx`.

    Args:
        options: as for `fusionpass.fuse`; only `profitable_only` looks at `inner` here.

    A call returns a `PassResult`: the new graph, and whether anything was rewritten. The given graph is not changed.
    `report` is the report of the last call. The graph must carry shapes. `symbolic_trace` leaves none, so run
    `ShapeProp` of `torch.fx.passes.shape_prop`, or `FakeTensorProp`, first. ShapeProp records no device. The inputs are
    then taken to be on the device of the parameters, each in memory of its own.

    Raises:
        ValueError: an unknown option or value; on a call, a graph without shapes.
    """

    def __init__(self, **options: Any):
        Options.from_user(options)
        self._options = options
        self.report: Report | None = None

    def call(self, graph_module: GraphModule) -> PassResult:
        graph_module, self.report = rewrite(graph_module, **self._options)
        return PassResult(graph_module, bool(self.report.rewrites))


class InductorPass(CustomGraphPass):
    """A custom pass for Inductor's `post_grad_custom_pre_pass`.

    Args:
        after: a pass that has the slot already. It runs first. (Inductor keeps only the pass that was assigned last.)
        options: as for `fusionpass.fuse`, but for `inner`.

    Raises:
        ValueError: an unknown option or value.
    """

    def __init__(self, *, after: Callable[[Graph], None] | None = None, **options: Any):
        self._options = Options.from_user({**options, "inner": "inductor"})
        self._after = after

    def __call__(self, graph: Graph) -> None:
        if self._after is not None:
            self._after(graph)
        with torch.no_grad():  # autograd is done with the graph: forward and backward are two graphs here
            outcome = run(graph.owning_module, self._options)
        collecting.record(outcome, compiled=False)

    def uuid(self) -> Any | None:
        """The identity of the pass for Inductor's caches: the package's sources, the options, the pass before it. If the
        pass before it has no identity, None, and then the caches are not used."""
        before = None
        if self._after is not None:
            before = self._after.uuid() if isinstance(self._after, CustomGraphPass) else None
            if before is None:
                return None
        return f"{digest(tuple(own(self._options.rules)))} {self._options!r} {before!r}"
