"""End to end: ms per decode step or prefill of a whole model, each mode without fusionpass and with it.

The model has random weights and decodes one token per sequence with a static cache. Sides take turns within a round, so
that a drift affects all of them. A time is the wall time from the first call to the end of the last kernel, per step. In
eager this is the host's time, under CUDA graphs the device's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from tabulate import tabulate

import fusionpass
from fusionpass.bench import MODES
from fusionpass.bench.timing import interleaved
from fusionpass.entry import backend
from fusionpass.operators import OPS
from fusionpass.private import reset

STEPS, PREFILLS = 16, 2  # calls per sample: the host's jitter averages out, and a cache for so many tokens is cheap
WARM_UP = 4  # a CUDA-graph tree warms up and records before it replays
OURS = tuple(op.name for op in OPS if op.direct is not None)  # the names of their kernels begin with these


@dataclass(frozen=True)
class Side:
    """One mode, without or with the pass: ms per step, and what one step launches."""

    ms: float  # median of the rounds
    spread_ms: float  # half the range
    kernels: int
    rewrites: int | None  # None without the pass
    share: float | None  # the part of the kernels' time that fusionpass's own kernels take


@dataclass(frozen=True)
class Cell:
    """One shape in one mode."""

    mode: str
    batch: int
    tokens: int  # tokens of a prefill; 0 means a decode step
    plain: Side
    fused: Side

    @property
    def ratio(self) -> float:
        return self.fused.ms / self.plain.ms

    @property
    def tie(self) -> bool:
        return abs(self.fused.ms - self.plain.ms) <= self.plain.spread_ms + self.fused.spread_ms


def named(target: str, layers: int | None, experts: str | None) -> str:
    """The model as it was built, for the head of a table."""
    cut = "" if layers is None else f", {layers} layers"
    return target + cut + ("" if experts is None else f", {experts} experts")


@dataclass(frozen=True)
class ModelRun:
    """Every cell of one model on one device."""

    target: str
    layers: int | None
    device: str
    torch: str
    rounds: int
    cells: list[Cell]
    experts: str | None = None  # transformers' implementation of the experts, if one was named

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def text(self, style: str) -> str:
        """A table, as "table" or "markdown"."""
        heads = ["", "mode", "ms without", "ms with", "with/without", "kernels", "with", "rewrites", "share"]
        body = []
        for cell in self.cells:
            what = f"prefill {cell.batch} x {cell.tokens}" if cell.tokens else f"decode, batch {cell.batch}"
            times = [f"{side.ms:.3f} ± {side.spread_ms:.3f}" for side in (cell.plain, cell.fused)]
            ratio = f"{'~' if cell.tie else ''}{cell.ratio:.3f}"
            share = f"{cell.fused.share:.1%}"
            counts = [cell.plain.kernels, cell.fused.kernels, cell.fused.rewrites]
            body.append([what, cell.mode, *times, ratio, *map(str, counts), share])
        kind = {"tablefmt": "pipe" if style == "markdown" else "simple", "disable_numparse": True}
        model = named(self.target, self.layers, self.experts)
        return (
            f"{model}, {self.device}, torch {self.torch}; ms per step, median of {self.rounds} rounds\n\n"
            + tabulate(body, heads, colalign=["left"] * 2 + ["right"] * 7, **kind)
            + "\n\nshare: the part of the kernels' time with fusionpass that its own kernels take; "
            "~: a tie, the difference is below the sum of the spreads."
        )


def randomise(model: torch.nn.Module) -> None:
    """Random weights that keep activations finite. Some models leave their experts' weights uninitialised."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)


@torch.no_grad()
def measure(
    model: torch.nn.Module,
    *,
    batches: Sequence[int],
    prefills: Sequence[int],
    rounds: int,
    modes: Sequence[str] = MODES,
    stage: Callable[[str], None] = lambda text: None,
) -> list[Cell]:
    """Every mode at every batch of a decode step and every prefill length of one sequence."""
    cells = []
    for batch, tokens in [(batch, 0) for batch in batches] + [(1, tokens) for tokens in prefills]:
        reset()  # or the next shape is compiled as a dynamic one
        cells += _cells(model, batch, tokens, rounds, modes, stage)
    reset()
    return cells


def _cells(
    model, batch: int, tokens: int, rounds: int, modes: Sequence[str], stage: Callable[[str], None]
) -> list[Cell]:
    what = f"prefill of {tokens}" if tokens else f"decode, batch {batch}"
    call, rewind = _prefill(model, tokens) if tokens else decode(model, batch)
    forwards, rewrites = {}, {}
    for mode in modes:
        for fused in (False, True):
            stage(f"{what}: compiling {mode}{' with fusionpass' if fused else ''}")
            forwards[mode, fused] = forward_of(model, mode, fused)
            rewind()
            with fusionpass.collect() as report:
                for _ in range(WARM_UP):
                    call(forwards[mode, fused])
            rewrites[mode, fused] = report.executed // WARM_UP if fused else None
    stage(f"{what}: timing")
    steps = PREFILLS if tokens else STEPS
    samplers = {key: partial(_us_per_step, partial(call, forward), rewind, steps) for key, forward in forwards.items()}
    timings = interleaved(samplers, rounds)
    sides = {}
    for key, forward in forwards.items():
        rewind()
        kernels, share = profiled(partial(call, forward))
        median, spread = (us / 1e3 for us in timings[key])
        sides[key] = Side(median, spread, kernels, rewrites[key], share if key[1] else None)
    return [Cell(mode, batch, tokens, sides[mode, False], sides[mode, True]) for mode in modes]


def _us_per_step(call: Callable[[], Any], rewind: Callable[[], None], steps: int) -> float:
    rewind()
    call()
    synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        call()
    synchronize()
    return (time.perf_counter() - start) / steps * 1e6


def synchronize() -> None:
    torch.cuda.synchronize()


def forward_of(model: torch.nn.Module, mode: str, fused: bool) -> Callable[..., Any]:
    if not fused:
        return model if mode == "eager" else torch.compile(model, mode=mode, dynamic=False)
    if mode == "eager":
        return torch.compile(model, backend=backend.fusionpass, options={"inner": "eager"}, dynamic=False)
    return torch.compile(model, backend=backend.fusionpass, mode=mode, dynamic=False)


def decode(model: torch.nn.Module, batch: int) -> tuple[Callable, Callable[[], None]]:
    """A step of one token per sequence, and a function that empties the cache again."""
    from transformers import StaticCache

    ids = torch.randint(0, _vocabulary(model), (batch, 1), device=model.device)
    cache = StaticCache(config=model.config, max_cache_len=4 * STEPS)
    model(input_ids=ids, past_key_values=cache, use_cache=True)  # allocates the cache before anything is compiled

    def call(forward):
        torch.compiler.cudagraph_mark_step_begin()
        return forward(input_ids=ids, past_key_values=cache, use_cache=True)

    def rewind():
        """Go back to the first token. `cache.reset` would make linear attention compile its prefill as well."""
        for layer in cache.layers:
            length = getattr(layer, "cumulative_length", None)
            if length is not None:
                length.zero_()

    return call, rewind


def _prefill(model: torch.nn.Module, tokens: int) -> tuple[Callable, Callable[[], None]]:
    ids = torch.randint(0, _vocabulary(model), (1, tokens), device=model.device)

    def call(forward):
        torch.compiler.cudagraph_mark_step_begin()
        return forward(input_ids=ids, use_cache=False, logits_to_keep=1)

    return call, lambda: None


def _vocabulary(model: torch.nn.Module) -> int:
    return model.get_input_embeddings().num_embeddings


def profiled(call: Callable[[], Any]) -> tuple[int, float]:
    """How many kernels one call has, and the share of their time that our kernels take."""
    call()
    synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [event for event in kernels if not event.name.startswith(("Memcpy", "Memset"))]
    total = sum(event.device_time for event in kernels)
    ours = sum(event.device_time for event in kernels if event.name.startswith(OURS))
    return len(kernels), ours / total if total else 0.0
