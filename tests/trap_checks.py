"""What a row of the trap table expects, and how a program is held to it through each tracer."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from programs import operands, tensors
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from trap_programs import BF16, autocast, autocast_inside, built, of

import fusionpass

TRACERS = ("export", "make_fx", "symbolic_trace")
COMPILERS = ("eager", "aot_eager", "inductor")
ENTRIES = (*COMPILERS, *TRACERS)
INDUCTORS = {1, 8, 26, 37, 49}  # a C++ compilation each
DRAWN_ANEW = 37
OLD, NEW = torch.__version__ < "2.12", torch.__version__ >= "2.14"


class Rewritten(NamedTuple):
    """So many sites are rewritten, and there is no near miss."""

    sites: int


class Refused(NamedTuple):
    """Nothing is rewritten: the near misses have these codes."""

    codes: str


NO_NEAR_MISS = Refused("")


class Raises(NamedTuple):
    """Eager raises this, and so does what comes of the program."""

    error: type[Exception]


class Untraceable(NamedTuple):
    """The tracer by itself, without the pass, raises this."""

    error: type[Exception] | tuple[type[Exception], ...]


class Unrunnable(NamedTuple):
    """The tracer's graph cannot be run: it has fake tensors among its constants."""


class Unlike(NamedTuple):
    """The tracer's own graph, before the pass, behaves otherwise than eager: the pass is held to that graph."""

    want: Rewritten | Refused


Want = Rewritten | Refused | Raises | Untraceable | Unrunnable | Unlike


class Trap:
    """One row: what must come of a program, by whichever entry point; `others` has those that see another graph."""

    def __init__(
        self,
        number: int,
        name: str,
        program: str | Callable,  # the body of program(a, b, g)
        want: Want,
        *,
        inputs: Callable[[], list] | None = None,  # of() where none are given
        around: Callable = nullcontext,
        **others: Want,
    ):
        assert others.keys() <= set(ENTRIES)
        self.number, self.name, self.program, self.want = number, name, program, want
        self.inputs, self.around, self.others = inputs or of(), around, others


class Program(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, a, b, g):
        return self.function(a, b, g)


def traced(entry: str, program: Callable, args: list) -> Any:
    if entry == "export":
        return torch.export.export(Program(program), tuple(args), strict=False)
    if entry == "make_fx":
        return make_fx(program, tracing_mode="fake")(*args)
    return torch.fx.symbolic_trace(program)


def runnable(program: Any) -> Callable:
    return program.module() if isinstance(program, torch.export.ExportedProgram) else program


class Seen(NamedTuple):
    """All that a run can be told by: results and inputs afterwards, who shares memory with whom, gradients."""

    values: list[torch.Tensor]
    shared: list
    gradients: list


def copied(args: list) -> list:
    """Copies that share memory among each other, and are laid out, as the originals are."""
    return copy.deepcopy(args)


def seen(run: Callable, args: list, around: Callable = nullcontext) -> Seen:
    args = copied(args)
    torch.manual_seed(0)
    with around():
        results = tensors(run(*args))
    leaves = [arg for arg in args if arg.requires_grad]
    recorded = [result for result in results if result.requires_grad]
    gradients = []
    if leaves and recorded:
        weights = operands(*[result.shape for result in recorded], seed=1)
        total = sum((result * weight).sum() for result, weight in zip(recorded, weights, strict=True))
        gradients = list(torch.autograd.grad(total, leaves, allow_unused=True))
    values = [*results, *args]
    strided = [value for value in values if value.layout is torch.strided]
    memory = [value.untyped_storage()._cdata for value in strided]
    shared = [(memory.index(key), value.storage_offset()) for key, value in zip(memory, strided, strict=True)]
    return Seen(values, shared, gradients)


def assert_same(got: Seen, want: Seen, truth: Seen | None, computed_in: float = 0) -> None:
    """truth: None where the bits must be eager's; else the result in float64, to which it must be no farther than eager
    by more than a unit in the last place. computed_in: eps of the coarsest dtype that eager computes in."""
    assert got.shared == want.shared
    assert len(got.values) == len(want.values)
    numbers = [
        value[value.isfinite()] for value in want.values if truth and value.is_floating_point() and not value.is_meta
    ]
    scale = max((value.abs().max().double() for value in numbers if value.numel()), default=0)
    for index, (g, w) in enumerate(zip(got.values, want.values, strict=True)):
        assert (type(g), g.dtype, g.shape, g.layout) == (type(w), w.dtype, w.shape, w.layout)
        assert g.requires_grad == w.requires_grad
        assert w.layout is not torch.strided or g.stride() == w.stride()
        if w.is_meta:
            continue
        if truth is None or not w.is_floating_point() or not w.numel():
            torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)
            continue
        t, finite, zero = truth.values[index].double(), w.isfinite(), (w == 0) & (g == 0)
        torch.testing.assert_close(g[~finite], w[~finite], equal_nan=True)
        assert torch.equal(g[zero].signbit(), w[zero].signbit())
        g, w, t = g[finite].double(), w[finite].double(), t[finite]
        if t.numel():
            eps = torch.finfo(want.values[index].dtype).eps
            # or it would be no truth of this program
            assert (w - t).abs().max() <= 8 * max(eps, computed_in) * scale
            assert (g - t).abs().max() <= (w - t).abs().max() + eps * t.abs().max()
    assert [d is None for d in got.gradients] == [d is None for d in want.gradients]
    for g, w in zip(got.gradients, want.gradients, strict=True):
        torch.testing.assert_close(g, w)


def in_double(args: list) -> list:
    return [arg.detach().double() if arg.is_floating_point() else arg for arg in args]


def coarsest(trap: Trap, args: list) -> float:
    """Where dtypes are mixed, a result in the wider one was rounded to the others on its way."""
    dtypes = [arg.dtype for arg in args if arg.is_floating_point()]
    if trap.around is autocast or trap.program is autocast_inside:
        dtypes.append(BF16)
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=0)


def kind(want: Want) -> str:
    if isinstance(want, Untraceable | Unrunnable):
        return "untraceable"
    if isinstance(want, Raises):
        return "raises"
    return "rewritten" if isinstance(want, Rewritten) else "refused" if want.codes else "no near miss"


def wanted(trap: Trap, entry: str) -> tuple[Want, bool]:
    """What must come of the trap, and whether the tracer's own graph is unlike eager."""
    want = trap.others.get(entry, trap.want)
    if entry in ("export", "make_fx") and isinstance(want, Raises):
        want = Untraceable((want.error, ValueError))  # what eager raises, or what fake tensors raise in its place
    return (want.want, True) if isinstance(want, Unlike) else (want, False)


def outcome(run: Callable, args: list, around: Callable = nullcontext) -> Seen | type[Exception]:
    try:
        return seen(run, args, around)
    except Exception as error:
        return type(error)


def differ(one: Seen | type, other: Seen | type) -> bool:
    if isinstance(one, type) or isinstance(other, type):
        return one is not other
    try:
        assert_same(one, other, None)
    except AssertionError:
        return True
    return False


def pairs(traps: list[Trap]) -> list[tuple[Trap, str]]:
    return [(trap, entry) for trap in traps for entry in ENTRIES if entry != "inductor" or trap.number in INDUCTORS]


def rows(traps: list[Trap]) -> list:
    """One parameter per trap and entry point."""
    return [pytest.param(trap, entry, id=f"{trap.number}: {trap.name}-{entry}") for trap, entry in pairs(traps)]


def check(trap: Trap, entry: str) -> None:
    program, args = built(trap.program), trap.inputs()
    want, unlike = wanted(trap, entry)
    eager = outcome(program, args, trap.around)
    if isinstance(want, Untraceable):
        with trap.around(), pytest.raises(want.error):
            traced(entry, program, copied(args))
        return
    if isinstance(want, Unrunnable):
        if OLD:
            with pytest.raises(AssertionError, match="Expected FakeTensor"):
                traced(entry, program, args)
            return
        assert any(isinstance(value, FakeTensor) for value in tensors(runnable(traced(entry, program, args))(*args)))
        return
    if isinstance(want, Raises):
        assert eager is want.error
        if entry == "symbolic_trace":
            with pytest.raises(ValueError, match="example_inputs do not fit the graph"):
                fusionpass.rewrite(traced(entry, program, args), copied(args))
            return
    if entry in COMPILERS:
        plain = torch.compile(program, backend=entry) if unlike else program
        after = fusionpass.fuse(lambda *inputs: program(*inputs), inner=entry)
    else:
        with trap.around():
            graph = traced(entry, program, copied(args))
            after, report = fusionpass.rewrite(graph, copied(args) if entry == "symbolic_trace" else None)
        plain, after = runnable(graph), runnable(after)
    if entry == "inductor" and trap.number == DRAWN_ANEW:
        check_draws(program, after, args)
        return
    before = outcome(plain, args, trap.around) if plain is not program else eager
    assert differ(before, eager) == unlike
    with fusionpass.collect() as collected, torch._inductor.config.patch(fallback_random=True):
        if isinstance(before, type):
            with pytest.raises(before):
                seen(after, args, trap.around)
        else:
            got = seen(after, args, trap.around)
    if isinstance(want, Raises):
        return
    report = collected if entry in COMPILERS else report
    sites, codes = (want.sites, "") if isinstance(want, Rewritten) else (0, want.codes)
    assert (len(report.rewrites), " ".join(miss.code for miss in report.misses)) == (sites, codes), report.misses
    assert all("{}" not in miss.reason for miss in report.misses)
    if not isinstance(before, type):
        exact = not sites and entry != "inductor"
        # A graph that export made of float32 holds it to that; where it is the program, the program tells the truth.
        truth = None if exact else seen(plain if unlike else program, in_double(args), trap.around)
        assert_same(got, before, truth, coarsest(trap, args))


def check_draws(program: Callable, after: Callable, args: list) -> None:
    """Inductor draws other numbers than eager from the same seed; they must be those of Inductor without the pass."""
    with torch._inductor.config.patch(fallback_random=True):
        want = seen(torch.compile(program, backend="inductor"), args)
        torch._dynamo.reset()
        got = seen(after, args)
    torch.testing.assert_close(got.values, want.values)
    assert got.shared == want.shared
