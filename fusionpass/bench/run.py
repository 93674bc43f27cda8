"""One run on the current CUDA GPU: the copy's bandwidth, then every case, then the CPU time of a call."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence

import torch

import fusionpass
from fusionpass._version import __version__
from fusionpass.bench.cases import OPS, Case, Operands, bytes_moved, bytes_read, draw
from fusionpass.bench.results import HostCost, Measurement, Run, Timing
from fusionpass.bench.sides import Side, calls_of, ensure_right, errors, sides_of, truth
from fusionpass.bench.timing import WARM_UP, Captured, call_count, gpu_times, host_times, set_count
from fusionpass.operators.functions import call_directly
from fusionpass.private import reset

DEVICE = "cuda"  # the current one
COPY_BYTES = 2**30  # bytes of the source: twenty times an L2 of 50 MB

Tell = Callable[[str, int], None]  # what is being done, and how many steps are done


def steps(cases: Sequence[Case]) -> int:
    """How many steps `measure` counts: the copy, each case, the CPU time of each forward op."""
    return 1 + len(cases) + len(_host_cases(cases))


def measure(cases: Sequence[Case], *, rounds: int, sets: int | None, tuned: bool, tell: Tell) -> Run:
    """Measure the cases, in order.

    Args:
        cases: at least one.
        rounds: samples per side, in addition to a first one that is thrown away.
        sets: how many sets of operands to rotate through, at most as many as fit; None: as many as read twice the L2 cache.
        tuned: also measure torch.compile with coordinate_descent_tuning. This takes most of the run's time.
        tell: is called before each step.

    Raises:
        RuntimeError: a side's result is wrong, or the GPU ran out of memory.
    """
    import triton

    tell("copy", 0)
    copy_us, copy_bytes = _copy(rounds)
    gbps = copy_bytes / copy_us.median_us / 1e3
    measurements = []
    for index, case in enumerate(cases):
        sides = _gpu_times(case, rounds, sets, tuned, lambda what, case=case, at=index + 1: tell(f"{case}: {what}", at))
        measurements.append(Measurement(*case, bytes_moved(case), sides))
    costs = []
    for index, case in enumerate(_host_cases(cases)):
        tell(f"{case}: CPU time", 1 + len(cases) + index)
        costs.append(HostCost(*case, _host_times(case)))
    reset()
    return Run(
        device=torch.cuda.get_device_name(),
        torch=torch.__version__,
        triton=triton.__version__,
        fusionpass=__version__,
        copy_gbps=gbps,
        copy_spread_gbps=gbps * copy_us.spread_us / copy_us.median_us,
        rounds=rounds,
        sets=sets,
        measurements=measurements,
        cpu=costs,
    )


def _copy(rounds: int) -> tuple[Timing, int]:
    """Time of one large device copy, and the bytes that it reads and writes.

    The faster of two copies counts: inside a CUDA graph on an H200, the driver's own copy moves 2.7 TB/s, an elementwise
    kernel 4.3.
    """
    free, _ = torch.cuda.mem_get_info()
    source = torch.empty(min(COPY_BYTES, free // 4) // 8, dtype=torch.int64, device=DEVICE).random_()
    target = torch.empty_like(source)
    ways = {"copy": functools.partial(target.copy_, source), "kernel": functools.partial(torch.neg, source, out=target)}
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    graphs = {name: Captured([call], 1, stream, pool) for name, call in ways.items()}
    return min(gpu_times(graphs, rounds).values(), key=lambda timing: timing.median_us), 2 * source.nbytes


def _gpu_times(
    case: Case, rounds: int, wanted: int | None, tuned: bool, tell: Callable[[str], None]
) -> dict[str, Timing]:
    """GPU time of each side on the same operands. Each side's result is first compared with float64."""
    import torch._functorch.config as functorch_config

    backward = OPS[case.op].backward
    reset()  # or the shapes of earlier cases count against the recompile limit
    gc.collect()  # references to the last case's graphs would keep their memory
    torch.cuda.empty_cache()
    # The first backward frees a donated buffer, but these backwards run repeatedly (retain_graph).
    with torch.set_grad_enabled(backward), functorch_config.patch(donated_buffer=False):
        # Everything runs on one stream: graphs that share a pool must, and autograd runs a backward on its forward's stream.
        stream = torch.cuda.Stream()
        sides = sides_of(case.op, tuned=tuned)
        with torch.cuda.stream(stream):
            sets = _sets(case, len(sides), wanted)
        stream.synchronize()
        pool, last = torch.cuda.graph_pool_handle(), sets[-1]
        graphs: dict[str, Captured] = {}
        exact: dict[Callable, tuple[torch.Tensor, ...]] = {}
        eager: list[float] = []
        for side in sides:
            tell("compiling" if side.name in ("compile", "tuned") else "capturing")
            with torch.cuda.stream(stream):
                calls = calls_of(side.function, sets)
            captured = Captured(calls, call_count(len(sets)), stream, pool)
            if side.expression not in exact:
                exact[side.expression] = truth(side.expression, last)
            eager = _check(case, side, captured, last, exact[side.expression], eager)
            captured.release_outputs()
            graphs[side.name] = captured
        exact.clear()
        tell("timing")
        return gpu_times(graphs, rounds)


def _check(
    case: Case, side: Side, captured: Captured, operands: Operands, exact: Sequence[torch.Tensor], eager: list[float]
) -> list[float]:
    """Compare the results of a replay with `exact`. Returns eager's errors, which come from its own side, the first one."""
    given = [t for t in (*operands.inputs, operands.dy) if t is not None]
    outputs = captured.replayed_last(given)
    found = errors(outputs, exact)
    reference = eager or found
    ensure_right(case, side, found, reference, outputs)
    return reference


def _sets(case: Case, sides: int, wanted: int | None) -> list[Operands]:
    """The sets of operands that every side rotates through."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    first = draw(case, generator)
    kept = 0 if first.dy is None else sides * first.dy.nbytes  # each side's forward leaves its result behind
    free, _ = torch.cuda.mem_get_info()
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    count = set_count(wanted, bytes_read(case), first.nbytes() + kept, cache, free)
    return [first, *(draw(case, generator) for _ in range(count - 1))]


def _host_cases(cases: Sequence[Case]) -> list[Case]:
    """For each forward op that the pass finds the case with the least work: CPU time does not depend on the shape."""
    smallest: dict[str, Case] = {}
    for case in cases:
        if OPS[case.op].found and not OPS[case.op].backward:
            known = smallest.get(case.op, case)
            smallest[case.op] = min(known, case, key=lambda each: (each.tokens, each.hidden))
    return list(smallest.values())


def _host_times(case: Case) -> dict[str, Timing]:
    """CPU time of a call without gradients on an idle GPU.

    `eager` and `rewritten` are the graph of the same symbolic_trace: once as it is, and once as the backend with
    inner="eager" runs it. Both are called through `forward`, which leaves out the hooks of nn.Module.__call__.
    """
    op = OPS[case.op]
    reset()
    inputs = draw(case, torch.Generator(DEVICE).manual_seed(0)).inputs
    traced = torch.fx.symbolic_trace(op.eager)
    rewritten = fusionpass.rewrite(traced, inputs, inner="eager", strict=True).graph_module
    call_directly(rewritten)
    functions = {
        "eager": traced.forward,
        "compile": torch.compile(op.eager, dynamic=False, fullgraph=True),
        "here": op.here,
        "rewritten": rewritten.forward,
    }
    calls = {name: functools.partial(function, *inputs) for name, function in functions.items()}
    with torch.no_grad():
        for call in calls.values():
            for _ in range(WARM_UP):
                call()
        return host_times(calls, torch.cuda.synchronize)
