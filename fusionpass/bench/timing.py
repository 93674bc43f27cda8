"""GPU time by replays of CUDA graphs over rotating buffers, CPU time by loops of calls; both interleaved.

GPU time. A graph holds at least 32 calls of one side, each on the next of several sets of operands. So launches cost
nothing, and few inputs are found in the L2 cache: one turn through the sets reads at least twice the cache, or there are
128 sets. (One row of 4096 in bf16 is 8 KB. So at few rows all sets together do fit in an L2 of 50 MB, and a time can then
be below the limit from the copy's bandwidth. Some of Inductor's kernels mark what they have read as first to leave the
cache. Such a side finds part of it there in the next turn. On an H200 this saved 14% at 32 x 2048 here, saved nothing where
the inputs are in the cache anyway, as in a model's decode, and cost 8% at 16384 x 4096.) Each call writes memory of its
own. The graphs of all sides of a case share one memory pool. They never run at the same time, and nobody reads what they
wrote, so all sides write the same addresses. A sample is the time between two CUDA events around replays of at least 2 ms,
divided by the number of calls.

CPU time. A sample is the host's time for a chunk of calls, divided by their number. The GPU is idle before it, and the
chunk has too few launches to fill the queue. With a full queue the host would wait for the GPU.

Samples of the sides alternate (A B C A B C ...), so that a drift of clocks or load affects all in the same way. The first
round is thrown away.
"""

from __future__ import annotations

import gc
import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fusionpass.bench.results import Timing
from fusionpass.bench.sides import Call, as_tuple

Side = TypeVar("Side", bound=Hashable)  # the name of a side

MIN_SETS, MAX_SETS = 2, 128
MIN_CALLS = 32  # per graph
WARM_UP = 3  # calls before the capture; the first one compiles
REGION_US = 2000.0  # GPU time per sample: event resolution is 0.5 us
MEMORY_SHARE = 4  # operands take at most a fourth of the free memory, and outputs too

# At most 1024 launches can wait for the GPU. The longest eager side has 5 kernels per call, so 750 per chunk.
CHUNK = 150
CHUNKS = 21
OUTLIERS = 3  # how many chunks the spread leaves out at each end: the host does other things too


def set_count(wanted: int | None, read_bytes: int, set_bytes: int, cache_bytes: int, free_bytes: int) -> int:
    """How many sets of operands to rotate through.

    Args:
        wanted: the number that the caller asks for; None: enough to read twice the cache, from MIN_SETS to MAX_SETS.
        read_bytes: bytes that one call reads.
        set_bytes: bytes of memory that one set takes.
        cache_bytes, free_bytes: L2 cache and free memory of the GPU.
    """
    fitting = free_bytes // MEMORY_SHARE // set_bytes
    if wanted is not None:
        return max(1, min(wanted, fitting))
    enough = math.ceil(2 * cache_bytes / read_bytes)
    return max(MIN_SETS, min(enough, fitting, MAX_SETS))


def call_count(sets: int) -> int:
    """Calls per graph: a multiple of the sets."""
    return sets * math.ceil(MIN_CALLS / sets)


class Captured:
    """A CUDA graph of `calls`, and the operands that it reads, which must live as long as the graph."""

    def __init__(self, calls: Sequence[Call], count: int, stream: torch.cuda.Stream, pool: tuple[int, int]):
        """Warm up on `stream` and capture `count` calls, in turn. The graph itself has not run yet."""
        self._calls = calls
        self._count = count
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            for i in range(WARM_UP):
                outputs = as_tuple(calls[i % len(calls)]())
        stream.synchronize()
        # A result that is kept is not overwritten. If memory is short, the oldest are dropped; many calls came after them.
        free, _ = torch.cuda.mem_get_info()
        fitting = free // MEMORY_SHARE // max(sum(t.nbytes for t in outputs), 1)
        del outputs
        kept: deque[tuple[Tensor, ...]] = deque(maxlen=max(MIN_SETS, min(count, fitting)))
        with torch.cuda.graph(self.graph, pool=pool, stream=stream):
            for i in range(count):
                kept.append(as_tuple(calls[i % len(calls)]()))
        self.last: tuple[Tensor, ...] | None = kept[-1]
        self._kept: deque[tuple[Tensor, ...]] | None = kept

    def replayed_last(self, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Outputs of the last call after one replay. What the replay does not write is nan.

        `operands` are the tensors of that call. An output that is one of them, as da is dy, is not changed.
        """
        given = {t.data_ptr() for t in operands}
        for output in self.last:
            if output.data_ptr() not in given:
                output.detach().fill_(math.nan)
        self.graph.replay()
        torch.cuda.synchronize()
        return self.last

    def release_outputs(self) -> None:
        """Give the outputs' memory back to the pool, for the next side's graph."""
        self.last = self._kept = None

    def sample(self, replays: int) -> float:
        """Microseconds per call over `replays` replays."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.graph.replay()  # keeps the GPU busy while the host queues the rest, so no launch latency is measured
        start.record()
        for _ in range(replays):
            self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / (replays * self._count)

    def replays(self) -> int:
        """How many replays take REGION_US."""
        self.sample(1)
        return max(1, math.ceil(REGION_US / (self.sample(3) * self._count)))


def interleaved(samplers: Mapping[Side, Callable[[], float]], rounds: int, *, outliers: int = 0) -> dict[Side, Timing]:
    """`rounds` samples of each side in turn, after one round that does not count. Samplers give microseconds."""
    samples: dict[Side, list[float]] = {name: [] for name in samplers}
    for number in range(rounds + 1):
        for name, sampler in samplers.items():
            us = sampler()
            if number > 0:
                samples[name].append(us)
    return {name: Timing.of(values, outliers=outliers) for name, values in samples.items()}


def gpu_times(graphs: Mapping[str, Captured], rounds: int) -> dict[str, Timing]:
    """GPU time per call of each graph's side."""

    def sampler(captured: Captured) -> Callable[[], float]:
        replays = captured.replays()
        return lambda: captured.sample(replays)

    return interleaved({name: sampler(captured) for name, captured in graphs.items()}, rounds)


def host_times(
    calls: Mapping[str, Call], synchronize: Callable[[], None], *, chunks: int = CHUNKS
) -> dict[str, Timing]:
    """CPU time per call of each side. `synchronize` waits for the device, outside of the timed part."""

    def sampler(call: Call) -> Callable[[], float]:
        def sample() -> float:
            synchronize()
            start = time.perf_counter()
            for _ in range(CHUNK):
                call()
            return (time.perf_counter() - start) * 1e6 / CHUNK

        return sample

    collecting = gc.isenabled()
    gc.disable()  # a collection would be counted for the side in which it happens
    try:
        return interleaved({name: sampler(call) for name, call in calls.items()}, chunks, outliers=OUTLIERS)
    finally:
        synchronize()
        if collecting:
            gc.enable()
