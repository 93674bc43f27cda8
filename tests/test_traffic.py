"""A record's kernels: eager's one per arithmetic node, and under Inductor what Inductor's scheduler really makes."""

import pytest
import torch
import torch.nn.functional as F
from programs import DEVICE
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import fusionpass
from fusionpass.engine import run
from fusionpass.operators import implementations, in_inductor
from fusionpass.options import Options
from fusionpass.rules import traffic

S = torch.sigmoid
T, H = 16, 64


def normed(total, weight):
    wide = total.float()
    return total, weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(total.dtype)


def routed(y, w, i):
    return torch.index_select(y * w.reshape(-1, 1), 0, i).view(T, -1, H).sum(1)  # y[i] asks for a GPU, fake as it is


def projected(x, w, b, bias=None):
    return S(F.linear(x, w, bias)) * b


# name -> program of (a, g, b, r, x, w, c, n, y, k, i)
PROGRAMS = {
    "core": lambda a, g, b, r, x, w, c, n, y, k, i: a + S(g) * b,
    "projection": lambda a, g, b, r, x, w, c, n, y, k, i: a + projected(x, w, b),
    "projection with a bias": lambda a, g, b, r, x, w, c, n, y, k, i: a + projected(x, w, b, c),
    "finalize": lambda a, g, b, r, x, w, c, n, y, k, i: routed(y, k, i) + S(g) * b,
    "einsum": lambda a, g, b, r, x, w, c, n, y, k, i: torch.einsum("tk,tkh->th", k, y.view(T, -1, H)) + S(g) * b,
    "residual": lambda a, g, b, r, x, w, c, n, y, k, i: r + (a + S(g) * b),
    "norm": lambda a, g, b, r, x, w, c, n, y, k, i: normed(a + S(g) * b, n),
    "residual and norm": lambda a, g, b, r, x, w, c, n, y, k, i: normed(r + (a + projected(x, w, b)), n),
    "finalize and projection": lambda a, g, b, r, x, w, c, n, y, k, i: routed(y, k, i) + projected(x, w, b),
    "finalize and norm": lambda a, g, b, r, x, w, c, n, y, k, i: normed(r + (routed(y, k, i) + S(g) * b), n),
    "all": lambda a, g, b, r, x, w, c, n, y, k, i: normed(r + (routed(y, k, i) + projected(x, w, b)), n),
}


def operands(top_k, dtype, device):
    shapes = dict(
        a=(T, H), g=(T, 1), b=(T, H), r=(T, H), x=(T, H), w=(1, H), c=(1,), n=(H,), y=(T * top_k, H), k=(T, top_k)
    )
    values = [torch.empty(shape, device=device, dtype=dtype) for shape in shapes.values()]
    return [*values, torch.empty(T * top_k, device=device, dtype=torch.int64)]  # nothing runs


class Scheduled(Exception):
    """Inductor has made its kernels; their code is not wanted."""


def scheduled(function, args, **options):
    """How many kernels Inductor makes, and the pass's records when it is given the backend."""
    found = []

    def count(nodes):
        found.append(len(nodes))
        raise Scheduled

    patches = {"_post_fusion_custom_pass": count, "fx_graph_cache": False}
    stopped = pytest.raises(BackendCompilerFailed, match="Scheduled")
    with torch.no_grad(), config.patch(patches), fusionpass.collect() as report, stopped:
        torch.compile(function, dynamic=False, **options)(*args)
    assert len(found) == 1
    return found[0], report.rewrites


FEW = [(name, 4, torch.bfloat16) for name in PROGRAMS]
MANY = [(name, 10, torch.bfloat16) for name in ("finalize", "finalize and projection", "finalize and norm", "all")]
WIDE = [(name, 4, torch.float32) for name in ("core", "projection with a bias", "all")]


@pytest.mark.parametrize("name, top_k, dtype", FEW + MANY + WIDE, ids=str)
def test_kernels_under_inductor(monkeypatch, name, top_k, dtype):
    """Before: Inductor on the program as it is. After, on a CPU: what it makes of the expression that it is given."""
    if DEVICE == "cpu":
        for module in (implementations, in_inductor, traffic):  # an interpreted kernel is no expression
            monkeypatch.setattr(module, "interpreted", lambda: False)
    args = operands(top_k, dtype, DEVICE)
    before, _ = scheduled(PROGRAMS[name], args)
    torch._dynamo.reset()
    after, (site,) = scheduled(PROGRAMS[name], args, backend="fusionpass", options={"profitable_only": False})
    assert site.against == "inductor"
    assert site.kernels_before == before
    assert site.kernels_after == (after if DEVICE == "cpu" or name == "core" else 1)


# On a GPU, counted by the scheduler on an H100: name -> (4 terms, 10 terms), each (as it is, tuned).
ON_A_GPU = {
    "core": ((1, 1), (1, 1)),
    "projection": ((2, 1), (2, 1)),
    "projection with a bias": ((2, 2), (2, 2)),
    "finalize": ((1, 1), (1, 1)),
    "einsum": ((2, 1), (2, 1)),
    "norm": ((1, 1), (1, 1)),
    "residual and norm": ((2, 1), (2, 1)),
    "finalize and projection": ((2, 1), (2, 2)),
    "finalize and norm": ((1, 1), (2, 2)),
    "all": ((2, 1), (3, 2)),
}


def outcome(name, top_k, inner, tuned=False):
    graph_module = torch.fx.symbolic_trace(PROGRAMS[name])
    with FakeTensorMode() as mode:
        args = operands(top_k, torch.bfloat16, "cuda")
    FakeTensorProp(graph_module, mode).propagate(*args)
    options = Options.from_user({"inner": inner, "profitable_only": False, "verify": False})
    with torch.no_grad():
        (site,) = run(graph_module, options, tuned=tuned).rewrites
    return site


@pytest.mark.parametrize("name", ON_A_GPU)
@pytest.mark.parametrize("top_k", [4, 10])
@pytest.mark.parametrize("tuned", [False, True], ids=["", "tuned"])
def test_kernels_under_inductor_on_a_gpu(name, top_k, tuned):
    site = outcome(name, top_k, "inductor", tuned)
    assert (site.kernels_before, site.kernels_after) == (ON_A_GPU[name][top_k == 10][tuned], 1)


@pytest.mark.parametrize("name", PROGRAMS)
def test_inductor_never_launches_or_moves_more_than_eager(name):
    eager, inductor = outcome(name, 10, "eager"), outcome(name, 10, "inductor")
    assert (eager.against, inductor.against) == ("eager", "inductor")
    assert inductor.kernels_before <= eager.kernels_before
    assert eager.bytes_before >= inductor.bytes_before >= inductor.bytes_after == eager.bytes_after


def test_bytes_under_inductor():
    """One kernel of the formula; the projection writes the logits, which the formula reads."""
    site = outcome("projection", 4, "inductor")
    assert site.bytes_before - site.bytes_after == 2 * T * 2
    both = outcome("all", 10, "inductor")
    assert both.bytes_before - both.bytes_after == 2 * T * 2 + 2 * T * H * 2  # and the sum, which the norm reads again


def test_the_summary_says_against_what():
    class Core(torch.nn.Module):
        def forward(self, a, g, b):
            return a + S(g) * b

    args = operands(4, torch.float32, "cpu")[:3]
    assert "kernels 3 -> 1 against eager, " in str(fusionpass.explain(Core())(*args))
    torch._dynamo.reset()
    both = fusionpass.explain(Core(), inner="inductor")(*args)
    assert "kernels 1 -> 1 against inductor, " in str(both)
    for text in (both.to_markdown(), both.to_html()):
        assert "against inductor" in text
    assert '"against": "inductor"' in both.to_json()
