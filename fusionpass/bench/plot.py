"""A run as a picture: a row per op, with the time against T for each H, and the bandwidth that the op reaches."""

from __future__ import annotations

from pathlib import Path

from fusionpass.bench.cases import OPS
from fusionpass.bench.results import Measurement, Run

SUFFIXES = (".png", ".svg", ".pdf")
COLORS = {"eager": "0.55", "compile": "tab:blue", "tuned": "tab:cyan", "add": "tab:green", "here": "tab:red"}
PANEL_INCHES = (3.6, 3.0)


def draw_run(run: Run, path: Path) -> None:
    """Write the picture to `path`, whose suffix is one of SUFFIXES. Needs matplotlib and no display.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    ops = [op for op in OPS if any(entry.op == op for entry in run.measurements)]
    widths = sorted({entry.hidden for entry in run.measurements})
    columns = len(widths) + 1
    size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * len(ops) + 0.6)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    dtypes = ", ".join(sorted({entry.dtype for entry in run.measurements}))
    figure.suptitle(f"{run.device}, {dtypes}, torch {run.torch}, triton {run.triton}, fusionpass {run.fusionpass}")
    panels = figure.subplots(len(ops), columns, squeeze=False)
    for row, op in zip(panels, ops, strict=True):
        of_op = [entry for entry in run.measurements if entry.op == op]
        for panel, hidden in zip(row, widths, strict=False):
            _times(panel, run, sorted((e for e in of_op if e.hidden == hidden), key=lambda e: e.tokens))
            panel.set_title(f"{op}, H = {hidden}", fontsize=8)
        _bandwidths(row[-1], run, of_op, widths)
        row[-1].set_title(f"{op}, bandwidth", fontsize=8)
    figure.savefig(path)


def _times(panel, run: Run, entries: list[Measurement]) -> None:
    """Microseconds against T, one line per side, with the spreads as bars."""
    for side, color in COLORS.items():
        points = [(e.tokens, *e.sides[side]) for e in entries if side in e.sides]
        if points:
            tokens, medians, spreads = zip(*points, strict=True)
            panel.errorbar(tokens, medians, spreads, label=side, color=color, marker="o", markersize=3, linewidth=1.2)
    if entries:
        limits = [run.limit(entry).median_us for entry in entries]
        panel.plot([e.tokens for e in entries], limits, label="limit", color="black", linestyle="--", linewidth=1)
        panel.legend(fontsize=7)
    _logarithmic(panel, entries)
    panel.set_yscale("log")
    panel.set_ylabel("us per call")


def _bandwidths(panel, run: Run, entries: list[Measurement], widths: list[int]) -> None:
    """GB/s of the formula's bytes against T, one line per H, below the line of the copy."""
    for hidden in widths:
        of_width = sorted((e for e in entries if e.hidden == hidden), key=lambda e: e.tokens)
        if of_width:
            reached = [e.bytes / e.sides["here"].median_us / 1e3 for e in of_width]
            panel.plot([e.tokens for e in of_width], reached, label=f"H = {hidden}", marker="o", markersize=3)
    panel.axhline(run.copy_gbps, label="copy", color="black", linestyle="--", linewidth=1)
    _logarithmic(panel, entries)
    panel.set_ylim(bottom=0)
    panel.set_ylabel("GB/s")
    panel.legend(fontsize=7)


def _logarithmic(panel, entries: list[Measurement]) -> None:
    """T on a logarithmic axis with a tick where something was measured."""
    tokens = sorted({entry.tokens for entry in entries})
    panel.set_xscale("log", base=2)
    panel.set_xticks(tokens, [str(t) for t in tokens], fontsize=7)
    panel.set_xlabel("T")
    panel.grid(alpha=0.3)
