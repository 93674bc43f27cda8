"""The pass in other people's pipelines: a `PassManager`, and Inductor's slot for custom passes."""

import pytest
import torch
import torch.nn.functional as F
from programs import DEVICE, abg, operands
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager

import fusionpass
from fusionpass.passes import InductorPass, Pass

S = torch.sigmoid


def formula(a, b, g):
    return a + S(g) * b


def targets(graph_module) -> list[str]:
    return [str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"]


def test_pass_returns_a_pass_result():
    args = abg()
    given = make_fx(formula)(*args)
    before = given.code
    fuse = Pass()
    result = fuse(given)
    assert isinstance(result, PassResult) and result.modified
    assert given.code == before and result.graph_module is not given
    assert [r.stages for r in fuse.report.rewrites] == [["gated_add"]]
    torch.testing.assert_close(result.graph_module(*args), formula(*args))
    assert not fuse(result.graph_module).modified


def test_pass_manager():
    args = abg()

    def rename(graph_module):
        for node in graph_module.graph.nodes:
            if node.target is torch.ops.aten.sub.Tensor:
                node.target = torch.ops.aten.add.Tensor
        return PassResult(graph_module, True)

    given = make_fx(lambda a, b, g: a - S(g) * b)(*args)
    result = PassManager(passes=[rename, Pass(strict=True)])(given)
    assert "fusionpass.gated_add.default" in targets(result.graph_module)
    torch.testing.assert_close(result.graph_module(*args), formula(*args))


def test_pass_checks_its_options_and_its_graph():
    with pytest.raises(ValueError, match="unknown option 'speed'"):
        Pass(speed=9)
    with pytest.raises(ValueError, match="no recorded shapes"):
        Pass()(torch.fx.symbolic_trace(formula))


def block(x, weight, up):
    return x + S(F.linear(x, weight)) * (x @ up)


class Counting(CustomGraphPass):
    """Somebody else's pass."""

    def __init__(self, name="counting"):
        self.name, self.graphs = name, 0

    def __call__(self, graph):
        self.graphs += 1

    def uuid(self):
        return self.name


def compiled(custom, function=block):
    return torch.compile(function, options={"post_grad_custom_pre_pass": custom, "fx_graph_cache": False})


def test_inductor_pass_rewrites_and_composes():
    x, weight, up = operands((4, 8), (1, 8), (8, 8))
    theirs, seen = Counting(), []

    class After(InductorPass):
        def __call__(self, graph):
            super().__call__(graph)
            seen.extend(str(node.target) for node in graph.nodes)

    with torch.no_grad(), fusionpass.collect() as report:
        got = compiled(After(after=theirs))(x, weight, up)
    assert theirs.graphs == 1
    assert [r.stages for r in report.rewrites] == [["gate_projection", "gated_add"]]
    assert "fusionpass.gate_projected_add.default" in seen
    torch.testing.assert_close(got, block(x, weight, up))


def test_inductor_pass_in_training():
    """Autograd is done with the graphs: the forward's formula is rewritten, what backward needs is still there."""
    args = [t.requires_grad_() for t in operands((4, 8), (1, 8), (8, 8))]
    with fusionpass.collect() as report:
        got = compiled(InductorPass())(*args)
        got.square().sum().backward()
    assert report.rewrites
    grads = [t.grad for t in args]
    want = torch.autograd.grad(block(*args).square().sum(), args)
    for grad, truth in zip(grads, want, strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-4, atol=1e-5)


def test_uuid_tells_options_sources_and_passes_apart(tmp_path, monkeypatch):
    from fusionpass.entry import cache_key

    same = [InductorPass(), InductorPass(), InductorPass(profitable_only=True)]
    assert len({p.uuid() for p in same}) == 1
    others = [
        InductorPass(),
        InductorPass(numerics="eager"),
        InductorPass(rules=["gated_add"]),
        InductorPass(after=Counting()),
        InductorPass(after=Counting("other")),
    ]
    assert len({p.uuid() for p in others}) == len(others)
    assert InductorPass(after=lambda graph: None).uuid() is None
    before = InductorPass().uuid()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "gated_add.py").write_text("changed = True\n")
    monkeypatch.setattr(cache_key, "__file__", str(tmp_path / "entry" / "cache_key.py"))
    cache_key.digest.cache_clear()
    assert InductorPass().uuid() != before
    cache_key.digest.cache_clear()


@pytest.mark.skipif(DEVICE == "cuda", reason="the same on a GPU, where compiling takes longer")
def test_inductor_pass_checks_its_options():
    with pytest.raises(ValueError, match="unknown option 'speed'"):
        InductorPass(speed=9)
