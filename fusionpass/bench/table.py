"""A run as text: one table per op and one of CPU times, for a terminal or for a Markdown file."""

from __future__ import annotations

from collections.abc import Callable

from tabulate import tabulate

from fusionpass.bench.cases import OPS
from fusionpass.bench.results import HostCost, Measurement, Ratio, Run

SIDES = ("eager", "compile", "tuned", "add")
RATIOS = ("compile", "tuned", "limit")
HOST_HEADS = {"eager": "eager", "compile": "compile", "here": "here (op)", "rewritten": "here (rewritten graph)"}


def run_text(run: Run, style: str) -> str:
    """The run as "table" or "markdown"."""
    markdown = style == "markdown"
    code = "`{}`".format if markdown else str
    blocks = [_header(run)]
    for op in OPS:
        rows = [measurement for measurement in run.measurements if measurement.op == op]
        if rows:
            blocks.append(f"{code(op)}, GPU us per call\n\n{_op_table(run, rows, markdown)}")
    if run.cpu:
        blocks.append(f"CPU us per call, no gradients\n\n{_host_table(run.cpu, markdown)}")
    blocks.append(_legend(run, code))
    return "\n\n".join(blocks)


def _header(run: Run) -> str:
    dtypes = ", ".join(sorted({entry.dtype for entry in (*run.measurements, *run.cpu)}))
    return (
        f"{run.device}, {dtypes}; a device copy moves {run.copy_gbps:.0f} GB/s; "
        f"median of {run.rounds} rounds, {_sets(run)}; "
        f"torch {run.torch}, triton {run.triton}, fusionpass {run.fusionpass}"
    )


def _sets(run: Run) -> str:
    if run.sets is None:
        return "up to 128 sets"
    return f"{run.sets} set{'' if run.sets == 1 else 's'}"


def _op_table(run: Run, rows: list[Measurement], markdown: bool) -> str:
    sides = [side for side in SIDES if any(side in row.sides for row in rows)]
    bases = [base for base in RATIOS if base == "limit" or base in sides]
    heads = ["T", "H", *sides, "here", "limit", *(f"here/{base}" for base in bases), "here GB/s"]
    body = []
    for row in rows:
        here, ratios = row.sides["here"], run.ratios(row)
        body.append(
            [
                str(row.tokens),
                str(row.hidden),
                *(_us(row.sides[side].median_us) if side in row.sides else "" for side in sides),
                f"{_us(here.median_us)} ± {_us(here.spread_us)}",
                _us(run.limit(row).median_us),
                *(_ratio(ratios[base]) if base in ratios else "" for base in bases),
                f"{row.bytes / here.median_us / 1e3:.0f}",
            ]
        )
    return _tabulated(body, heads, markdown, left=0)


def _host_table(costs: list[HostCost], markdown: bool) -> str:
    sides = [side for side in HOST_HEADS if any(side in cost.sides for cost in costs)]
    body = []
    for cost in costs:
        times = [cost.sides.get(side) for side in sides]
        cells = ["" if time is None else f"{time.median_us:.1f} ± {time.spread_us:.1f}" for time in times]
        body.append([cost.op, str(cost.tokens), str(cost.hidden), *cells])
    return _tabulated(body, ["op", "T", "H", *(HOST_HEADS[side] for side in sides)], markdown, left=1)


def _tabulated(body: list[list[str]], heads: list[str], markdown: bool, left: int) -> str:
    """A table. The first `left` columns are words, the others are numbers."""
    align = ["left"] * left + ["right"] * (len(heads) - left)
    style = "github" if markdown else "simple"
    return tabulate(body, heads, tablefmt=style, disable_numparse=True, colalign=align)


def _legend(run: Run, code: Callable[[str], str]) -> str:
    lines = ["limit: the bytes of the formula, each read or written once, at the bandwidth of the copy."]
    if any("add" in row.sides for row in run.measurements):
        lines.append("add: one torch.add(a, b), which moves the same bytes without the gate.")
    cut = "; for CPU times without the fastest and slowest few" if run.cpu else ""
    lines.append("sets: sets of operands, used in turn; from memory if one turn reads more than the L2 cache.")
    lines.append(f"{code('±')}: half the range of the samples{cut}.")
    lines.append(f"{code('~')}: a tie, the difference is below the sum of the two spreads.")
    return "\n".join(lines)


def _us(us: float) -> str:
    """About three digits, never with an exponent."""
    return f"{us:.2f}" if us < 9.995 else f"{us:.1f}" if us < 99.95 else f"{us:.0f}"


def _ratio(ratio: Ratio) -> str:
    return f"{'~' if ratio.tie else ''}{ratio.value:.2f}"
