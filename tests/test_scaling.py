"""The pass alone (matching, growing, guarding, replacing) takes time near linear in the graph's size.

No clock: counted are the calls of Python functions, which repeat exactly and rise with the work.
"""

import cProfile
import operator
import pstats

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule

from fusionpass.engine import run
from fusionpass.options import Options


def layered(layers: int, *, writes: bool = False) -> GraphModule:
    """A graph of `layers` times ten nodes, one site in each; with `writes`, an in-place update in each as well."""
    graph = Graph()
    with FakeTensorMode():
        wide, narrow = torch.empty(8, 16), torch.empty(8, 1)
        weight = torch.empty(1, 16)

        def node(target, *args, value=wide):
            new = graph.call_function(target, args)
            new.meta["example_value"] = torch.empty_like(value)
            return new

        x, w = graph.placeholder("x"), graph.placeholder("w")
        x.meta["example_value"], w.meta["example_value"] = wide, weight
        for _ in range(layers):
            b = node(torch.tanh, node(torch.sin, x))
            a = node(torch.cos, x)
            gate = node(F.linear, x, w, value=narrow)
            product = node(operator.mul, node(F.sigmoid, gate, value=narrow), b)
            y = node(operator.add, a, product)
            scratch = node(torch.exp, y)
            if writes:
                scratch = graph.call_method("mul_", (scratch, 2))
                scratch.meta["example_value"] = scratch.args[0].meta["example_value"]
            else:
                scratch = node(torch.neg, scratch)
            x = node(operator.add, x, scratch)
    graph.output(x)
    return GraphModule({}, graph)


def calls(graph_module: GraphModule) -> int:
    graph_module.recompile = lambda: None  # the pass alone: writing the new code down is fx's work
    profile = cProfile.Profile()
    outcome = profile.runcall(run, graph_module, Options())
    assert all(r.stages == ["gate_projection", "gated_add"] for r in outcome.rewrites)
    assert len(outcome.rewrites) == outcome.nodes // 10
    return pstats.Stats(profile).total_calls


@pytest.mark.parametrize("writes", [False, True], ids=["functional", "with writes"])
def test_work_grows_linearly(writes):
    small, large = calls(layered(100, writes=writes)), calls(layered(1000, writes=writes))
    assert large < 11 * small
