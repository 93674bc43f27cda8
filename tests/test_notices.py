"""What is said where nothing was rewritten: once per function and kind of reason, by rank 0, and true of its call; under
`strict` each call is judged by the graphs that ran in it."""

import asyncio
import contextlib
import logging
import re

import pytest
import torch
from programs import DEVICE, abg, operands
from torch.utils._python_dispatch import TorchDispatchMode

import fusionpass

S = torch.sigmoid
EAGER = {"backend": "fusionpass", "options": {"inner": "eager"}}


def formula(a, b, g):
    return a + S(g) * b


@pytest.fixture
def said(caplog):
    """The warnings given so far."""
    return lambda: [r.getMessage() for r in caplog.records if r.name == "fusionpass" and r.levelname == "WARNING"]


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x).relu()


class Sites(Plain):
    def forward(self, x):
        return x + S(self.linear(x)) * x.tanh()


class Broken(torch.nn.Module):
    """Children that Dynamo cannot trace into in one graph."""

    def __init__(self, *children):
        super().__init__()
        self.children_ = torch.nn.ModuleList(children)

    def forward(self, x):
        for child in self.children_:
            x = child(x)
            torch._dynamo.graph_break()
        return x


class Hooked(Broken):
    """Children behind hooks that Dynamo does not trace: each runs as a function of its own, as under FSDP2."""

    def __init__(self, *children):
        super().__init__(*children)
        for child in children:
            child.register_forward_pre_hook(torch._dynamo.disable(lambda module, args: None))

    @torch._dynamo.disable(recursive=False)
    def forward(self, x):
        for child in self.children_:
            x = child(x)
        return x


def _shapes(compiled):
    for rows in range(2, 9):
        compiled(torch.ones(rows, 8, device=DEVICE))


def _dtypes(compiled):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        compiled(torch.ones(4, 8, device=DEVICE, dtype=dtype))


def _once(compiled):
    compiled(torch.ones(4, 8, device=DEVICE))


def _near_misses(compiled):
    for rows in (2, 3):
        compiled(torch.ones(rows, 8, device=DEVICE, dtype=torch.float64))


# name -> how many warnings come out, of what is compiled and called. A name of a node or a size makes no other kind.
ONCE = {
    "backend, seven shapes": (1, lambda: _shapes(torch.compile(lambda x: x.relu(), dynamic=False, **EAGER))),
    "backend, three dtypes": (1, lambda: _dtypes(torch.compile(lambda x: x.relu(), **EAGER))),
    "backend, equal layers": (1, lambda: [_once(torch.compile(Plain().to(DEVICE), **EAGER)) for _ in range(4)]),
    "backend, two kinds of layers": (
        2,
        lambda: [
            _once(torch.compile(torch.nn.Sequential(layer), **EAGER))
            for layer in (torch.nn.Tanh(), torch.nn.ReLU(), torch.nn.Tanh())
        ],
    ),
    "backend, one near miss at two shapes": (
        1,
        lambda: _near_misses(torch.compile(lambda x: x + S(x) * x, dynamic=False, **EAGER)),
    ),
    "backend, pieces": (1, lambda: _once(torch.compile(Broken(Plain(), Plain()).to(DEVICE), **EAGER))),
    "backend, hooks": (1, lambda: _once(torch.compile(Hooked(*[Plain() for _ in range(5)]).to(DEVICE), **EAGER))),
    "backend, a site and pieces": (0, lambda: _once(torch.compile(Broken(Sites(), Plain()).to(DEVICE), **EAGER))),
    "backend, a site and hooks": (0, lambda: _once(torch.compile(Hooked(Sites(), Plain()).to(DEVICE), **EAGER))),
    "fuse, seven shapes": (1, lambda: _shapes(fusionpass.fuse(lambda x: x.relu()))),
    "fuse, equal layers": (1, lambda: [_once(fusionpass.fuse(Plain().to(DEVICE))) for _ in range(4)]),
    "fuse, one near miss at two shapes": (1, lambda: _near_misses(fusionpass.fuse(lambda x: x + S(x) * x))),
    "fuse, pieces": (1, lambda: _once(fusionpass.fuse(Broken(Plain(), Plain()).to(DEVICE)))),
    "fuse, hooks": (1, lambda: _once(fusionpass.fuse(Hooked(Plain(), Plain()).to(DEVICE)))),
    "fuse, hooks before a site": (0, lambda: _once(fusionpass.fuse(Hooked(Plain(), Sites()).to(DEVICE)))),
}


@pytest.mark.parametrize(("times", "program"), ONCE.values(), ids=ONCE)
def test_once_per_function_and_kind(times, program, said):
    program()
    assert len(said()) == times, said()


def test_a_reset_speaks_again(said):
    compiled = torch.compile(lambda x: x.relu(), **EAGER)
    _once(compiled)
    torch._dynamo.reset()
    _once(torch.compile(lambda x: x.relu(), **EAGER))
    _once(compiled)
    assert len(said()) == 3


@pytest.mark.parametrize("program", [EAGER, None], ids=["backend", "fuse"])
@pytest.mark.parametrize(("rank", "times"), [(0, 1), (1, 0)])
def test_rank_0_speaks(rank, times, program, said, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG, logger="fusionpass")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    _once(fusionpass.fuse(lambda x: x.relu()) if program is None else torch.compile(lambda x: x.relu(), **program))
    assert len(said()) == times
    assert len([r for r in caplog.records if r.name == "fusionpass"]) == 1  # the others log it for those who debug


@pytest.fixture
def alone():
    """A process group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


SHARDED = {
    "backend, no site": ((Plain, Plain, Plain), False, 1),
    "backend, a site first": ((Sites, Plain, Plain), False, 0),
    "backend, a site last": ((Plain, Plain, Sites), False, 1),
    "fuse, no site": ((Plain, Plain, Plain), True, 1),
    "fuse, a site last": ((Plain, Plain, Sites), True, 0),
}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize(("layers", "fuse", "times"), SHARDED.values(), ids=SHARDED)
def test_fsdp2_is_one_model(layers, fuse, times, said, alone):
    """Its hooks have each child run as a function of its own, and none of them ends at a graph break."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    model = torch.nn.Sequential(*[layer() for layer in layers])
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    compiled = fusionpass.fuse(model) if fuse else torch.compile(model, **EAGER)
    with fusionpass.collect() as report:
        compiled(torch.ones(2, 8))
    assert len(report.graphs) >= 1 and len(report.rewrites) == layers.count(Sites)
    assert len(said()) == times, said()


# ---- strict judges each call


def test_strict_judges_each_call():
    fused = fusionpass.fuse(lambda a, b, g: a + S(g) * b, strict=True)
    good, bad = abg(), [arg.double() for arg in abg()]
    for args, refused in ((bad, True), (good, False), (bad, True), (good, False), (bad, True)):
        if refused:
            with pytest.raises(fusionpass.NothingRewritten, match="1 x dtype"):
                fused(*args)
        else:
            torch.testing.assert_close(fused(*args), formula(*args))


def test_strict_is_content_with_any_graph_of_the_call():
    model = fusionpass.fuse(Broken(Plain(), Sites(), Plain()).to(DEVICE), strict=True)
    for _ in range(2):
        _once(model)


def test_strict_of_pieces_without_a_site():
    model = fusionpass.fuse(Broken(Plain(), Plain()).to(DEVICE), strict=True)
    for _ in range(2):
        with pytest.raises(fusionpass.NothingRewritten, match="0 rewritten in [23] graphs: no sigmoid"):
            _once(model)


def test_a_call_that_loses_its_site_says_so(said):
    fused = fusionpass.fuse(lambda a, b, g: a + S(g) * b)
    fused(*abg())
    assert said() == []
    for _ in range(2):
        fused(*[arg.double() for arg in abg()])
    (message,) = said()
    assert "1 x dtype" in message


def test_layers_without_a_site_beside_others_are_quiet(said):
    """A dense layer of a fused class has nothing to lose."""

    @fusionpass.fuse
    class Layer(torch.nn.Module):
        def __init__(self, sparse):
            super().__init__()
            self.sparse = sparse

        def forward(self, x):
            return x + S(x) * x.tanh() if self.sparse else x.relu()

    for sparse in (True, False, True, False):
        _once(Layer(sparse))
    assert said() == []


# ---- why no graph ran


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def words(x):
    return x


def yields(x):
    yield x + S(x) * x


async def awaits(x):
    return x + S(x) * x


def sites(x):
    return x + S(x) * x.tanh()


# name -> function, what is around the call, what the sentence says
UNSEEN = {
    "stance force_eager": (sites, lambda: torch.compiler.set_stance("force_eager"), r"set_stance\('force_eager'\)"),
    "stance eager_on_recompile": (
        sites,
        lambda: torch.compiler.set_stance("eager_on_recompile"),
        "'eager_on_recompile'",
    ),
    "config.disable": (sites, lambda: torch._dynamo.config.patch(disable=True), "TORCH_COMPILE_DISABLE"),
    "a dispatch mode": (sites, Watch, "TorchDispatchMode is active"),
    "no tensor operation": (words, contextlib.nullcontext, "found no tensor operation in words"),
    "generator": (yields, contextlib.nullcontext, "returned a generator"),
    "coroutine": (awaits, contextlib.nullcontext, "returned a coroutine"),
}


def settled(function, result):
    """The tensor, of whatever the function returns."""
    if function is awaits:
        return asyncio.run(result)
    return next(result) if function is yields else result


@pytest.mark.parametrize(("function", "around", "sentence"), UNSEEN.values(), ids=UNSEEN)
def test_why_no_graph_ran(function, around, sentence, said):
    (x,) = operands((4, 8))
    fused, strict = fusionpass.fuse(function), fusionpass.fuse(function, strict=True)
    want = settled(function, function(x))
    with around(), fusionpass.collect() as report:
        for _ in range(2):
            torch.testing.assert_close(settled(function, fused(x)), want, rtol=0, atol=0)
        with pytest.raises(fusionpass.NothingRewritten, match=sentence):
            strict(x)
    (message,) = said()
    assert re.search(sentence, message)
    assert report.graphs == [] and report.why_nothing() == message


def test_a_transform_around_the_call_is_named():
    fused = fusionpass.fuse(formula, strict=True)
    with pytest.raises(fusionpass.NothingRewritten, match="torch.func transform"):
        torch.vmap(fused)(*[torch.stack([arg, arg]) for arg in abg()])


def test_the_environment_switches_dynamo_off(monkeypatch, said):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    args = abg()
    torch.testing.assert_close(fusionpass.fuse(formula)(*args), formula(*args), rtol=0, atol=0)
    (message,) = said()
    assert "TORCHDYNAMO_DISABLE is 1" in message


def fused_before():
    fused = fusionpass.fuse(lambda x: x + S(x) * x.tanh())
    return fused, fused


def backend_before():
    compiled = torch.compile(lambda x: x.relu(), **EAGER)
    return compiled, compiled


def nothing_called():
    return (lambda x: None), (lambda x: None)


# name -> (what is called before the block, what within), what the report says
BLOCKS = {
    "fused and compiled before": (fused_before, "had been compiled before"),
    "backend and compiled before": (backend_before, "had been compiled before"),
    "nothing": (nothing_called, "no graph was compiled with fusionpass: nothing uses the backend"),
}


@pytest.mark.parametrize(("make", "sentence"), BLOCKS.values(), ids=BLOCKS)
def test_a_block_without_a_compilation_says_why(make, sentence):
    (x,) = operands((4, 8))
    before, within = make()
    before(x)
    with fusionpass.collect() as outer:
        with fusionpass.collect() as report:
            within(x)
        with fusionpass.collect() as empty:
            pass
    assert sentence in report.why_nothing() and sentence in outer.why_nothing() and sentence in str(report)
    assert "no graph was compiled with fusionpass" in empty.why_nothing()


def test_a_block_under_a_stance_says_so():
    (x,) = operands((4, 8))
    compiled = torch.compile(lambda x: x.relu(), **EAGER)
    with torch.compiler.set_stance("force_eager"), fusionpass.collect() as report:
        compiled(x)
    assert "force_eager" in report.why_nothing()


def test_explain_compiles_what_was_compiled_before():
    args = abg()
    fusionpass.fuse(formula)(*args)
    torch.compile(formula, backend="fusionpass", options={"inner": "eager"})(*args)
    assert len(fusionpass.explain(formula)(*args).rewrites) == 1


@pytest.mark.parametrize("stance", ["default", "force_eager"])
def test_explain_of_nothing(stance, said):
    (x,) = operands((4, 8))
    with torch.compiler.set_stance(stance):
        report = fusionpass.explain(words)(x)
        with pytest.raises(fusionpass.NothingRewritten):
            fusionpass.explain(words, strict=True)(x)
    assert said() == [report.why_nothing()]
    assert ("force_eager" in report.why_nothing()) == (stance == "force_eager")


# ---- arguments


def keyword_only(a, *, b, g, scale=1.0):
    return a + S(g) * b * scale if scale != 1.0 else a + S(g) * b


def variadic(*tensors, **named):
    return tensors[0] + S(named["g"]) * tensors[1]


def nested(pair, table):
    return {"sum": pair[0] + S(table["g"]) * pair[1]}


CALLS = {
    "keyword-only": (keyword_only, lambda a, b, g: ((a,), {"b": b, "g": g})),
    "variadic": (variadic, lambda a, b, g: ((a, b), {"g": g})),
    "nested": (nested, lambda a, b, g: (((a, b), {"g": g}), {})),
}


@pytest.mark.parametrize(("function", "spelled"), CALLS.values(), ids=CALLS)
def test_arguments_pass_through(function, spelled):
    args, kwargs = spelled(*abg())
    fused = fusionpass.fuse(function, strict=True)
    for _ in range(2):
        torch.testing.assert_close(fused(*args, **kwargs), function(*args, **kwargs))


def test_an_exception_of_the_call_passes_through_and_leaves_no_trace(said):
    @fusionpass.fuse
    def raises(a, b, g):
        (a + S(g) * b).sum()
        raise KeyError("of the model")

    for _ in range(2):
        with pytest.raises(KeyError, match="of the model"):
            raises(*abg())
    with pytest.raises(TypeError, match="argument"):
        raises(*abg(), 1, 2)
    fusionpass.fuse(formula, strict=True)(*abg())
    assert said() == []
