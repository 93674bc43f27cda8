"""What an op, a launch and a compilation do in contexts of their own: autograd's saved tensors, transforms of torch.func,
more elements than 32 bits count, several processes, symbolic sizes. The numbers are those of `test_traps`.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ops_helpers import record_launches
from trap_checks import Refused, Rewritten, Trap, Untraceable, check, copied, outcome, rows, seen
from trap_programs import BF16, H, S, T, built, formula, of

import fusionpass
from fusionpass.entry.backend import fusionpass as backend


def test_a_sum_in_place_of_what_autograd_saved():
    """31: eager raises in backward, for exp's result is overwritten. A fresh sum overwrites nothing."""

    def program(a, b, g):
        a = a.exp()
        a += S(g) * b
        return a

    assert outcome(program, of(grad=True)()) is RuntimeError
    for inner in ("eager", "aot_eager"):
        torch._dynamo.reset()
        got = seen(fusionpass.fuse(lambda *inputs: program(*inputs), inner=inner), of(grad=True)())
        want = seen(lambda a, b, g: a.exp() + S(g) * b, of(grad=True)())
        for g, w in zip(got.values + got.gradients, want.values + want.gradients, strict=True):
            torch.testing.assert_close(g, w)


def test_a_write_that_autograd_must_hear_of():
    """31: the op with out= is a write like any other."""
    a, b, g = of()()
    saved = a.requires_grad_().exp()
    with torch.no_grad():
        fusionpass.ops.gated_add(saved, g, b, out=saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


OPS = {  # the op as a function of a, b, g, beside the formula
    "gated_add": (lambda a, b, g: torch.ops.fusionpass.gated_add(a, g, b), formula),
    "gate_projected_add": (
        lambda a, b, g: torch.ops.fusionpass.gate_projected_add(b, g.view(1, -1), None, a, b),
        lambda a, b, g: a + S(b @ g) * b,
    ),
    "moe_combine": (
        lambda a, b, g: torch.ops.fusionpass.moe_combine(a, b, x=b, gate_weight=g.view(1, -1))[0],
        lambda a, b, g: a + S(b @ g) * b,
    ),
}
ALL = (0, 1, 2)
TRANSFORMS = {  # of f, a function of (a, b, g)
    "jvp": lambda f, args: torch.func.jvp(f, args, tuple(arg.cos() for arg in args)),
    "jvp, one tangent": lambda f, args: torch.func.jvp(lambda g: f(*args[:2], g), args[2:], (args[2].cos(),)),
    "grad": lambda f, args: torch.func.grad(lambda *x: f(*x).sin().sum(), ALL)(*args),
    "vjp": lambda f, args: torch.func.vjp(f, *args)[1](args[0].cos()),
    "jacrev": lambda f, args: torch.func.jacrev(f, ALL)(*args),
    "jacfwd": lambda f, args: torch.func.jacfwd(f, ALL)(*args),
    "hessian": lambda f, args: torch.func.hessian(lambda g: f(*args[:2], g).sin().sum())(args[2]),
    "vmap": lambda f, args: torch.vmap(f, (0, 0, None))(*(arg.expand(3, *arg.shape) for arg in args[:2]), args[2]),
    "vmap of grad": lambda f, args: torch.vmap(torch.func.grad(lambda s: f(args[0], args[1] * s, args[2]).sum()))(
        args[0][0]
    ),
    "dual numbers": lambda f, args: _dual(f, args),
}


def _dual(f, args):
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(f(*(forward_ad.make_dual(arg, arg.cos()) for arg in args))))


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize(("op", "expression"), OPS.values(), ids=OPS)
def test_transforms_of_an_op(op, expression, transform):
    """46: a derivative that is silently zero would be the worst of answers."""
    args = tuple(of(g=(T, 1) if expression is formula else (H, 1))())
    torch.testing.assert_close(transform(op, args), transform(expression, args))


@pytest.mark.parametrize(("rows", "wide"), [(2**20 - 1, False), (1_100_000, True)])
def test_more_elements_than_32_bits_count(monkeypatch, rows, wide):
    """56: nothing is allocated; that the wide offsets are right is `test_ops_layouts`' to hold."""
    from fusionpass.kernels import gated_add as kernel

    a, b, g = (torch.empty((rows, width), dtype=BF16, device="meta") for width in (2048, 2048, 1))
    with fusionpass.collect() as report:
        result = fusionpass.fuse(lambda a, b, g: a + S(g) * b, verify=False)(a, b, g)
    assert (len(report.rewrites), result.shape, result.stride()) == (1, a.shape, a.stride())
    recorded = record_launches(monkeypatch, kernel)
    for operand in (a, torch.empty_strided(a.shape, (4096, 2), dtype=BF16, device="meta")):
        kernel._prepared(result, operand, g, b, "fp32")
    assert [launch.arguments["WIDE"] for launch in recorded] == [wide, True]


def all_reduce(tensor):
    from torch.distributed._functional_collectives import all_reduce, wait_tensor

    return wait_tensor(all_reduce(tensor, "sum", dist.group.WORLD))  # eager's own result would wait when it is read


def on_cpu():
    return [tensor.cpu() for tensor in of()()]


def reduced_between(a, b, g):
    m = S(g) * b
    dist.all_reduce(b)
    return a + m


def reduced_before(a, b, g):
    dist.all_reduce(b)
    return a + S(g) * b


COLLECTIVES = [
    Trap(59, "b reduced in between", reduced_between, Refused("mutation-between"), inputs=on_cpu,
         symbolic_trace=Untraceable(RuntimeError)),
    Trap(59, "b reduced before", reduced_before, Rewritten(1), inputs=on_cpu,
         symbolic_trace=Untraceable(RuntimeError)),
    Trap(59, "a copy reduced in between", lambda a, b, g: ((m := S(g) * b), all_reduce(b), a + m)[1:], Rewritten(1),
         inputs=on_cpu),
    Trap(59, "the sum reduced", lambda a, b, g: all_reduce(a + S(g) * b), Rewritten(1), inputs=on_cpu),
]  # fmt: skip


@pytest.fixture
def world(tmp_path):
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("trap", "entry"), rows(COLLECTIVES))
def test_collectives(world, trap, entry):
    check(trap, entry)


@pytest.mark.parametrize("entry", ["eager", "aot_eager"])
@pytest.mark.parametrize("placements", ["RRR", "SSS", "PPR", "PPP", "inside"])
def test_dtensors(world, placements, entry):
    """58: a DTensor's own rules decide where the sum lives."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh, kinds = init_device_mesh("cpu", (1,)), {"R": Replicate(), "S": Shard(0), "P": Partial()}
    local = on_cpu()

    def distributed(tensors, placements):
        return [
            DTensor.from_local(t, mesh, [kinds[p]], run_check=False) for t, p in zip(tensors, placements, strict=True)
        ]

    def inside(a, b, g):
        return formula(*distributed((a, b, g), "RRR"))

    program, args = (inside, local) if placements == "inside" else (formula, distributed(local, placements))
    want = program(*args)
    with fusionpass.collect() as report:
        got = fusionpass.fuse(lambda *inputs: program(*inputs), inner=entry)(*args)
    assert (report.rewrites, [miss.code for miss in report.misses]) == ([], ["subclass"])
    assert (type(got), got.placements, got.shape) == (DTensor, want.placements, want.shape)
    assert torch.equal(got.full_tensor(), want.full_tensor())


SYMBOLIC = {
    "formula": formula,
    "gate projection": lambda a, b, g: a + S(F.linear(a, g)) * b,
    "refused": lambda a, b, g: (m := S(a) * b, a + m),
    "+=": built("a = a * 2; a += S(g) * b; return a"),
}


@pytest.mark.parametrize("name", SYMBOLIC)
def test_one_compilation_for_all_sizes(name):
    """61: a question asked of a symbolic size must not become a guard."""
    graphs = []

    def counting(graph_module, example_inputs):
        graphs.append(graph_module)
        return backend(graph_module, example_inputs, options={"inner": "eager"})

    program = SYMBOLIC[name]
    compiled = torch.compile(program, backend=counting, dynamic=True)
    with fusionpass.collect() as report:
        for rows in (5, 18, 33):
            args = of((rows, H), (rows, H), (1, H) if name == "gate projection" else (rows, 1))()
            torch.testing.assert_close(compiled(*copied(args)), program(*copied(args)))
    assert len(graphs) == 1
    assert (len(report.rewrites), [m.code for m in report.misses]) == (
        (0, ["multi-use"]) if name == "refused" else (1, [])
    )
