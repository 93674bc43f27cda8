"""The ops under torch.compile and other tracers."""

import ops_operands
import pytest
import torch
from ops_helpers import DEVICE
from ops_operands import gated_add_op, gated_operands, gradients, normal, projected_op, projected_operands

from fusionpass import ops

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")  # NumPy, of inf and nan
implementation = ops_operands.implementation


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_once_for_several_sizes(implementation, backend):
    compiles = []

    def counting(graph, inputs):
        compiles.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    def function(x, weight, a, gate, b, out):
        y = projected_op(x, weight, None, ops.gated_add(a, gate, b), b)
        return gated_add_op(ops.gated_add(y, gate[:, 0], b, out=out), gate, a, numerics="eager")

    compiled = torch.compile(function, backend=counting, fullgraph=True, dynamic=True)
    for rows in (5, 7, 11, 6):
        make = normal(seed=rows)
        x, weight, a, gate, b = make((rows, 6)), make((1, 6)), make((rows, 8)), make((rows, 1)), make((rows, 8))
        outs = torch.zeros_like(a), torch.zeros_like(a)
        torch.testing.assert_close(compiled(x, weight, a, gate, b, outs[0]), function(x, weight, a, gate, b, outs[1]))
        torch.testing.assert_close(*outs)
    assert len(compiles) == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training(implementation, backend):
    inputs = projected_operands(requires_grad=True)
    gate = normal(requires_grad=True)((4, 1))

    def function(x, weight, bias, a, b, gate):
        return gated_add_op(projected_op(x, weight, bias, a, b), gate, b)

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    dy = normal(seed=1)((4, 8))
    got, expected = (gradients(f, (*inputs, gate), dy) for f in (compiled, function))
    torch.testing.assert_close(got, expected)


def test_out_in_place_compiled(implementation):
    compiled = torch.compile(lambda a, gate, b: ops.gated_add(a, gate, b, out=a), backend="aot_eager", fullgraph=True)
    a, gate, b = gated_operands()
    expected = ops.gated_add(a, gate, b)
    assert torch.equal(compiled(a, gate, b), expected)
    assert torch.equal(a, expected)


def test_make_fx_records_the_ops():
    from torch.fx.experimental.proxy_tensor import make_fx

    a, gate, b = gated_operands()
    graph = make_fx(lambda a, gate, b: ops.gated_add(a, gate, b, out=torch.empty_like(a)))(a, gate, b)
    targets = [node.target for node in graph.graph.nodes]
    assert torch.ops.fusionpass._gated_add_out.default in targets
    assert torch.equal(graph(a, gate, b), ops.gated_add(a, gate, b))


def test_exported_as_one_node():
    class Module(torch.nn.Module):
        def forward(self, a, gate, b):
            return ops.gated_add(a, gate, b)

    inputs = gated_operands()
    program = torch.export.export(Module(), inputs)
    for graph in (program.graph, program.run_decompositions().graph):
        assert [n.target for n in graph.nodes if n.op == "call_function"] == [gated_add_op]
    assert torch.equal(program.module()(*inputs), ops.gated_add(*inputs))


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need CUDA")
def test_cuda_graph_capture():
    x, weight, bias, a, b = projected_operands(torch.bfloat16)
    gate = normal(torch.bfloat16)((4, 1))

    def run():
        return gated_add_op(projected_op(x, weight, bias, a, b), gate, b)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    a.add_(1.0)
    graph.replay()
    assert torch.equal(y, run())
