"""`rewrite` leaves its input alone, asks for shapes where there are none, and its records are true."""

import io

import pytest
import torch
from programs import DEVICE, Block, abg, captured, operands
from torch.fx.experimental.proxy_tensor import make_fx

import fusionpass

S = torch.sigmoid


def test_the_graph_given_stays_as_it_is():
    block, (x,) = Block().to(DEVICE), operands((4, 8))
    given = torch.fx.symbolic_trace(block)
    code, nodes, meta = given.code, [n.name for n in given.graph.nodes], [dict(n.meta) for n in given.graph.nodes]
    after, report = fusionpass.rewrite(given, example_inputs=[x])
    assert len(report.rewrites) == 1 and after is not given
    assert (given.code, [n.name for n in given.graph.nodes]) == (code, nodes)
    assert [dict(n.meta) for n in given.graph.nodes] == meta
    assert dict(after.named_parameters())["gate.weight"] is block.gate.weight
    torch.testing.assert_close(after(x), given(x))


def test_children_of_the_graph_given_stay_as_they_are():
    def function(x):
        return torch.cond(x.sum() > 0, lambda x: x + S(x) * x.cos(), lambda x: x.sin(), (x,))

    (x,) = operands((4, 8))
    given = make_fx(function)(x)
    code = given.true_graph_0.code
    after, report = fusionpass.rewrite(given)
    assert len(report.rewrites) == 1
    assert given.true_graph_0.code == code != after.true_graph_0.code
    torch.testing.assert_close(after(x), given(x))


def test_exported_program_whose_output_is_the_site():
    """The program's signature names its output node, which is the replacement now; it still saves and loads."""
    block, (x,) = Block().to(DEVICE), operands((4, 8))
    program = torch.export.export(block, (x,))
    after, report = fusionpass.rewrite(program)
    assert [r.stages for r in report.rewrites] == [["gate_projection", "gated_add"]]
    assert "sigmoid" in str(program.graph_module.code)
    file = io.BytesIO()
    torch.export.save(after, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x), block(x))


def test_exported_program_whose_inputs_have_builtins_names():
    """As `forward(self, input)` of many modules; the copy of a graph would call it `input_1`."""

    class Named(torch.nn.Module):
        def forward(self, input, sum):
            return input + S(sum) * input.cos()

    args = tuple(operands((4, 8), (4, 1)))
    program = torch.export.export(Named(), args)
    after, report = fusionpass.rewrite(program)
    assert len(report.rewrites) == 1
    file = io.BytesIO()
    torch.export.save(after, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(*args), Named()(*args))
    torch.testing.assert_close(after.module()(*args), Named()(*args))


def test_exported_in_place_sum():
    """Export keeps `+=` as aten.add_; its target is a temporary of the graph, so a fresh sum is the same."""

    class Older(Block):
        def forward(self, x):
            total = x * 2
            total += S(self.gate(x)) * x.tanh()
            return total.reshape(2, 2, 8)

    block, (x,) = Older().to(DEVICE), operands((4, 8))
    program = torch.export.export(block, (x,))
    assert "add_" in program.graph_module.code
    after, report = fusionpass.rewrite(program)
    assert len(report.rewrites) == 1
    torch.testing.assert_close(after.module()(x), block(x))


BAD = {
    "a module": (lambda: fusionpass.rewrite(Block()), TypeError, "trace the model first"),
    "no shapes": (lambda: fusionpass.rewrite(torch.fx.symbolic_trace(Block())), ValueError, "example_inputs"),
    "too few inputs": (
        lambda: fusionpass.rewrite(torch.fx.symbolic_trace(Block()), []),
        ValueError,
        "has 0 values, the graph takes 1",
    ),
    "inputs that do not fit": (
        lambda: fusionpass.rewrite(torch.fx.symbolic_trace(Block()), [torch.randn(4, 9)]),
        ValueError,
        "do not fit the graph",
    ),
    "unknown option": (
        lambda: fusionpass.rewrite(torch.fx.symbolic_trace(Block()), [torch.randn(4, 8)], fast=1),
        ValueError,
        "unknown option 'fast'",
    ),
    "inputs as one tensor": (
        lambda: fusionpass.rewrite(torch.fx.symbolic_trace(Block()), torch.randn(1, 8)),
        TypeError,
        "example_inputs is a Tensor: it takes a list or tuple",
    ),
    "inputs by name": (
        lambda: fusionpass.rewrite(torch.fx.symbolic_trace(Block()), {"x": torch.randn(1, 8)}),
        TypeError,
        "example_inputs is a dict",
    ),
    "a number for inputs": (lambda: fusionpass.rewrite(torch.fx.symbolic_trace(Block()), 1), TypeError, "is a int"),
    "no tensor among inputs": (
        lambda: fusionpass.rewrite(torch.fx.symbolic_trace(Block()), ["x"]),
        ValueError,
        "do not fit the graph",
    ),
    "a graph by itself": (
        lambda: fusionpass.rewrite(torch.fx.symbolic_trace(Block()).graph),
        TypeError,
        "given a Graph: it takes",
    ),
    "rules as a number": (lambda: fusionpass.fuse(Block(), rules=5), TypeError, "option 'rules' is 5: it takes a list"),
    "rules as a dict": (lambda: fusionpass.fuse(Block(), rules={"gated_add": True}), TypeError, "option 'rules' is {"),
    "rules without the core": (lambda: fusionpass.fuse(Block(), rules=[]), ValueError, "without 'gated_add'"),
    "an unknown rule": (
        lambda: fusionpass.fuse(Block(), rules=["gated_ad"]),
        ValueError,
        "names 'gated_ad': allowed are",
    ),
    "no inner compiler": (lambda: fusionpass.fuse(Block(), inner=None), TypeError, "option 'inner' is None"),
    "a flag that is none": (lambda: fusionpass.fuse(Block(), verify="yes"), TypeError, "option 'verify' is 'yes'"),
    "unknown numerics": (lambda: fusionpass.fuse(Block(), numerics="fp8"), ValueError, "'fp8': allowed are 'fp32' and"),
    "nothing to explain": (lambda: fusionpass.explain(None), TypeError, "explain was given None"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message, caplog):
    with pytest.raises(error, match=message):
        call()
    assert [record for record in caplog.records if record.exc_info] == []  # torch logs no traceback of its own


def test_sizes_that_do_not_fit_are_one_sentence(caplog):
    graph = torch.fx.symbolic_trace(lambda a, b, g: a + S(g) * b)
    with pytest.raises(ValueError, match="do not fit the graph: .*broadcast") as raised:
        fusionpass.rewrite(graph, operands((4, 8), (4, 8), (3, 1)))
    assert "\n" not in str(raised.value) and caplog.records == []


def test_strict():
    graph = make_fx(torch.tanh)(torch.randn(3))
    with pytest.raises(fusionpass.NothingRewritten):
        fusionpass.rewrite(graph, strict=True)


def test_collected():
    a, b, g = abg()
    with fusionpass.collect() as report:
        fusionpass.rewrite(make_fx(lambda a, b, g: a + S(g) * b)(a, b, g))
    assert len(report.rewrites) == 1 and report.executed == 1


def test_kernels_and_bytes_of_a_record():
    """T x H in bf16: eager's four kernels read and write each operand and result once; the op only the ends."""
    rows, width = 32, 64
    x, w, a, b = operands((rows, width), (1, width), (rows, width), (rows, width), dtype=torch.bfloat16)
    (site,) = captured(lambda x, w, a, b: a + S(x @ w.t()) * b, x, w, a, b).rewrites
    wide, narrow = 2 * rows * width, 2 * rows
    matmul, sigmoid, mul, add = wide + 2 * width + narrow, 2 * narrow, narrow + 2 * wide, 3 * wide
    assert (site.kernels_before, site.bytes_before) == (4, matmul + sigmoid + mul + add)
    assert (site.kernels_after, site.bytes_after) == (1, 4 * wide + 2 * width)


def test_a_kept_sigmoid_counts_on_both_sides():
    a, b, g = abg()
    (site,) = captured(lambda a, b, g: (a + S(g) * b, S(g)), a, b, g).rewrites
    (kept,) = captured(lambda a, b, g: ((s := S(g)), a + s * b), a, b, g).rewrites
    assert (site.kernels_before, site.kernels_after) == (3, 1)
    assert (kept.kernels_before, kept.kernels_after) == (3, 2)
    assert kept.nodes == ["mul", "add"]


def test_source_and_module_of_a_record():
    block, (x,) = Block().to(DEVICE), operands((4, 8))
    (site,) = captured(torch.nn.Sequential(torch.nn.Identity(), block), x).rewrites
    line = Block.forward.__code__.co_firstlineno + 1
    assert site.source == f"programs.py:{line}"
    assert site.module == "1"
    assert (site.shape, site.dtype, site.graph, site.calls) == ([4, 8], "float32", 0, 1)


def test_symbolic_sizes_are_named_not_guessed():
    block, (x,) = Block().to(DEVICE), operands((4, 8))
    torch._dynamo.mark_dynamic(x, 0)
    (site,) = captured(block, x).rewrites
    assert isinstance(site.shape[0], str) and site.shape[1] == 8
    assert isinstance(site.bytes_before, int)


def test_bad_input_leaves_the_graph_as_it_was():
    given = torch.fx.symbolic_trace(Block())
    code, nodes = given.code, list(given.graph.nodes)
    for arguments, options in (((), {}), (([torch.randn(4, 9)],), {}), (([torch.randn(4, 8)],), {"rules": ["none"]})):
        with pytest.raises(ValueError):
            fusionpass.rewrite(given, *arguments, **options)
    assert given.code == code and list(given.graph.nodes) == nodes
