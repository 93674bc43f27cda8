"""The time that the pass adds to torch.compile: seconds for the first call of a whole model, without it and with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate

from fusionpass.bench.steps import decode, forward_of, named
from fusionpass.private import compilation_time_metrics as timings
from fusionpass.private import config, reset

WHOLE, PASS = "_compile.compile_inner", "pass.pre_grad_passes.fusionpass"  # names in Dynamo's table of times


@dataclass(frozen=True)
class CompileTime:
    """One mode, compiled without caches."""

    mode: str
    plain_s: float  # of torch.compile, from the frame to the compiled code
    fused_s: float  # the same with fusionpass
    pass_s: float  # of that, the pass itself

    @property
    def share(self) -> float:
        return self.pass_s / self.fused_s


@dataclass(frozen=True)
class CompileRun:
    """Every mode of one model on one device."""

    target: str
    layers: int | None
    device: str
    torch: str
    times: list[CompileTime]
    experts: str | None = None  # as in ModelRun

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def text(self, style: str) -> str:
        """A table, as "table" or "markdown"."""
        heads = ["mode", "s without", "s with", "with/without", "the pass, s", "its share"]
        body = []
        for time in self.times:
            seconds = [f"{time.plain_s:.2f}", f"{time.fused_s:.2f}", f"{time.fused_s / time.plain_s:.3f}"]
            body.append([time.mode, *seconds, f"{time.pass_s:.3f}", f"{time.share:.2%}"])
        kind = {"tablefmt": "pipe" if style == "markdown" else "simple", "disable_numparse": True}
        model = named(self.target, self.layers, self.experts)
        head = f"{model}, {self.device}, torch {self.torch}; seconds of torch.compile, without its caches"
        return f"{head}\n\n" + tabulate(body, heads, colalign=["left"] + ["right"] * 5, **kind)


@torch.no_grad()
def compile_times(
    model: torch.nn.Module, *, batch: int, modes: Sequence[str], stage: Callable[[str], None]
) -> list[CompileTime]:
    """Each mode except eager, which compiles nothing without the pass. A first compilation is not counted, since both sides
    import and probe some things only once."""
    found = []
    call, rewind = decode(model, batch)
    with config.patch(force_disable_caches=True):
        for mode in ["default", *[mode for mode in modes if mode != "eager"]]:
            seconds = {}
            for fused in (False, True):
                stage(f"compiling {mode}{' with fusionpass' if fused else ''}")
                reset()
                rewind()
                timings.clear()
                call(forward_of(model, mode, fused))
                seconds[fused] = {name: sum(timings.get(name, ())) for name in (WHOLE, PASS)}
            found.append(CompileTime(mode, seconds[False][WHOLE], seconds[True][WHOLE], seconds[True][PASS]))
    reset()
    return found[1:]
