"""Write a report as a terminal table, Markdown or HTML.

The table folds sites that differ only in their layer into one line, and writes their modules as a range
(`model.layers.{0..47}.mlp`). Markdown and HTML have a row per site, and JSON has an entry per site.
"""

from __future__ import annotations

import html as html_module
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fusionpass._version import __version__
from fusionpass.report.wording import common, count, ranges, skeleton, stem

if TYPE_CHECKING:
    from fusionpass.report.findings import Findings
    from fusionpass.report.records import Miss, Rewrite

WIDTH = 118  # columns of the terminal table
FOLD_FROM = 4  # this many similar sites become one line
STAR = r"\1*"  # a node name without its number
_NAME = re.compile(r"\b([A-Za-z]\w*?)(?:_\d+)+\b")


def tabulate(*args: Any, **options: Any) -> str:
    """`tabulate.tabulate`, imported where a report is first shown: `import fusionpass` stays light."""
    import tabulate as library

    return library.tabulate(*args, **options)


def table(report: Findings) -> str:
    """The report for a terminal of 120 columns. It is plain ASCII if the names in it are."""
    blocks = [_title(report)]
    if report.rewrites:
        blocks.append(_rewrite_table(report))
    blocks += [_stopped_lines(report), _miss_lines(report), _break_lines(report), summary(report)]
    return "\n\n".join(block for block in blocks if block)


def markdown(report: Findings) -> str:
    """The report as GitHub Markdown, one row per site."""
    return _document(report, "## {}", "### {}", _md, lambda rows, heads: _grid(rows, heads, "github", _md), _md)


def html(report: Findings) -> str:
    """The report as an HTML fragment, one row per site, every text escaped."""
    body = _document(
        report,
        "<h2>{}</h2>",
        "<h3>{}</h3>",
        lambda text: f"<p>{html_module.escape(text)}</p>",
        lambda rows, heads: _grid(rows, heads, "html", str),
        html_module.escape,
    )
    return f'<section class="fusionpass">\n{body}\n</section>'


def summary(report: Findings) -> str:
    """Everything in one line: counts, kernels and bytes; if nothing was rewritten, why."""
    tail = [count(len(report.graphs), "graph"), count(len(report.graph_breaks), "graph break")]
    if not report.rewrites:
        return f"{report.why_nothing()} ({count(len(report.graph_breaks), 'graph break')})"
    stages: dict[str, int] = {}
    for rewrite in report.rewrites:
        for stage in rewrite.stages:
            if stage != rewrite.rule:
                stages[stage] = stages.get(stage, 0) + 1
    grown = ", ".join(f"{count} with {stage}" for stage, count in stages.items())
    head = f"{len(report.rewrites)} rewritten" + (f" ({grown})" if grown else "")
    counts = [head, count(len(report.misses), "near miss"), *tail]
    captured, executed = len(report.rewrites), report.executed
    if executed != captured:
        plural = "site" if captured == 1 else "sites"
        verb = "runs" if captured == 1 else "run"
        counts.insert(1, f"{captured} {plural} captured, {verb} {_times(executed)}")
    return f"{', '.join(counts)}; {_savings(report)}"


def _title(report: Findings) -> str:
    import torch

    versions = f"fusionpass {__version__}, torch {torch.__version__}"
    return f"{report.target}  ({versions})" if report.target else versions


def _rewrite_table(report: Findings) -> str:
    """One line per site or per fold of similar sites: where, how many, what, in which modules, by which rule."""
    with_runs = report.executed != len(report.rewrites)
    heads = ["source", "sites", *(["runs"] if with_runs else []), "rewrote", "module", "rule"]
    rows = []
    for sites in _folds(report.rewrites, _likeness):
        first = sites[0]
        names = [common(column) for column in zip(*(site.nodes for site in sites), strict=False)]
        became = common([site.replacement for site in sites])
        runs = [str(sum(_runs(report, site) for site in sites))] if with_runs else []
        rows.append(
            [
                _source(first),
                str(len(sites)),
                *runs,
                f"{', '.join(names)} -> {became} {first.dtype}{_shape(first)}",
                ", ".join(ranges(_module(site) for site in sites)),
                f"[{_rule(first)}]",
            ]
        )
    fixed = sum(max(len(cell) for cell in column) for column in list(zip(heads, *rows, strict=True))[: len(heads) - 3])
    room = WIDTH - fixed - 2 * (len(heads) - 1)
    widths = [None] * (len(heads) - 3) + [room * 44 // 100, room * 33 // 100, room * 23 // 100]
    return tabulate(rows, heads, tablefmt="simple", disable_numparse=True, maxcolwidths=widths)


def _likeness(site: Rewrite) -> tuple:
    stems = tuple(stem(name) for name in site.nodes)
    kernels = (site.kernels_before, site.kernels_after)
    return (site.source, tuple(site.stages), stems, tuple(site.shape), site.dtype, kernels, skeleton(site.module))


def _folds(sites: Sequence[Any], likeness: Callable[[Any], Any], fold_from: int = FOLD_FROM) -> list[list[Any]]:
    """Groups of similar sites, in the order of their first sites. A few similar ones stay alone, to show their exact
    names."""
    groups: dict[Any, list[Any]] = {}
    for site in sites:
        groups.setdefault(likeness(site), []).append(site)
    folds = []
    for group in groups.values():
        folds += [group] if len(group) >= fold_from else [[site] for site in group]
    return folds


def worth_a_word(site: Rewrite) -> list[dict[str, str]]:
    """The stages that did not join though what follows is not another stage's."""
    return [stop for stop in site.stopped if stop["code"] != "not-there"]


def _stopped_lines(report: Findings) -> str:
    """Stages that did not join, by stage and code. Those of which there is nothing to join are left out."""
    found: dict[tuple[str, str], list[tuple[Rewrite, str]]] = {}
    for site in report.rewrites:
        for stop in worth_a_word(site):
            found.setdefault((stop["stage"], stop["code"]), []).append((site, stop["reason"]))
    lines = [
        f"  [{stage} / {code}] {count(len(sites), 'site')}: {_flat(sites[0][1])}"
        for (stage, code), sites in found.items()
    ]
    return "\n".join(["stages that did not join", *lines]) if lines else ""


def _miss_lines(report: Findings) -> str:
    """Near misses by code, then by sentence, then where."""
    if not report.misses:
        return ""
    lines = ["near misses"]
    by_code: dict[tuple[str, str], list[Miss]] = {}
    for miss in report.misses:
        by_code.setdefault((miss.rule, miss.code), []).append(miss)
    for (rule, code), misses in sorted(by_code.items(), key=lambda item: -len(item[1])):
        lines.append(f"  [{rule} / {code}] {count(len(misses), 'site')}")
        for alike in _folds(misses, lambda miss: _NAME.sub(r"\1", _flat(miss.reason))):
            sentence = _flat(alike[0].reason)
            lines.append(f"    {_NAME.sub(STAR, sentence) if len(alike) > 1 else sentence}")
            folds = _folds(alike, lambda miss: (miss.source, skeleton(miss.module), stem(miss.node)), 2)
            rows = [
                [
                    f"{_source(fold[0])}:",
                    f"{len(fold)} x" if len(fold) > 1 else "",
                    f"missed {common([miss.node for miss in fold])}",
                    ", ".join(ranges(_module(miss) for miss in fold)),
                ]
                for fold in folds
            ]
            text = tabulate(rows, tablefmt="plain", disable_numparse=True, maxcolwidths=[None, None, None, 60])
            lines += [f"      {line}".rstrip() for line in text.splitlines()]
    return "\n".join(lines)


def _break_lines(report: Findings) -> str:
    counts: dict[tuple[str, str], int] = {}
    for each in report.graph_breaks:
        key = (each.source or "-", _flat(each.reason))
        counts[key] = counts.get(key, 0) + 1
    rows = [[f"{source}:", f"{count} x", reason] for (source, reason), count in counts.items()]
    text = tabulate(rows, tablefmt="plain", disable_numparse=True, maxcolwidths=[None, None, 80])
    return "\n".join(["graph breaks", *(f"  {line}".rstrip() for line in text.splitlines())]) if rows else ""


def _document(report, title: str, heading: str, paragraph, grid, escape: Callable[[str], str] = str) -> str:
    """The layout Markdown and HTML share."""
    blocks = [title.format(escape(_title(report))), paragraph(summary(report))]
    sections = (("Rewritten", REWRITE_HEADS, _rewrite_rows), ("Near misses", MISS_HEADS, _miss_rows))
    for name, heads, rows_of in (*sections, ("Graph breaks", BREAK_HEADS, _break_rows)):
        rows = rows_of(report)
        if rows:
            blocks += [heading.format(name), grid(rows, heads)]
    return "\n\n".join(blocks)


REWRITE_HEADS = (
    "source",
    "module",
    "rewrote",
    "op",
    "result",
    "rule",
    "kernels",
    "bytes",
    "graph",
    "runs",
    "not joined",
)
MISS_HEADS = ("source", "module", "missed", "rule / code", "reason", "graph", "runs")
BREAK_HEADS = ("source", "reason")


def _rewrite_rows(report: Findings) -> list[list[str]]:
    return [
        [
            _source(site),
            _module(site),
            ", ".join(site.nodes),
            site.replacement,
            f"{site.dtype}{_shape(site)}",
            _rule(site),
            f"{site.kernels_before} -> {site.kernels_after} against {site.against}",
            f"{_bytes(site.bytes_before)} -> {_bytes(site.bytes_after)}",
            str(site.graph),
            str(_runs(report, site)),
            "; ".join(f"{stop['stage']} / {stop['code']}: {stop['reason']}" for stop in worth_a_word(site)),
        ]
        for site in report.rewrites
    ]


def _miss_rows(report: Findings) -> list[list[str]]:
    return [
        [_source(m), _module(m), m.node, f"{m.rule} / {m.code}", m.reason, str(m.graph), str(m.calls)]
        for m in report.misses
    ]


def _break_rows(report: Findings) -> list[list[str]]:
    return [[each.source or "-", each.reason] for each in report.graph_breaks]


def _grid(rows: list[list[str]], heads: Sequence[str], style: str, escape: Callable[[str], str]) -> str:
    cells = [[escape(_flat(cell)) for cell in row] for row in rows]
    return tabulate(cells, heads, tablefmt=style, disable_numparse=True)


def _md(cell: str) -> str:
    """A cell that cannot end its column, open a tag or start emphasis."""
    cell = cell.replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\").replace("|", "\\|")
    cell = re.sub(r"([*`]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", cell)  # an underscore inside a name is plain
    return cell.replace("](", "]\\(")


def _savings(report: Findings) -> str:
    """Kernels and bytes before and after, and whose kernels "before" means. Each site counts as often as it ran, or once if
    nothing ran."""
    captured, executed = len(report.rewrites), report.executed
    weights = [_runs(report, site) if executed else 1 for site in report.rewrites]
    sums = []
    for name in ("kernels_before", "kernels_after", "bytes_before", "bytes_after"):
        values = [getattr(site, name) for site in report.rewrites]
        known = None not in values
        sums.append(sum(value * weight for value, weight in zip(values, weights, strict=True)) if known else None)
    against = " and ".join(sorted({site.against for site in report.rewrites}))
    kernels = f"kernels {sums[0]} -> {sums[1]} against {against}"
    traffic = "bytes unknown" if None in sums[2:] else f"bytes {_bytes(sums[2])} -> {_bytes(sums[3])}"
    return f"{kernels}, {traffic} {'per call' if executed in (0, captured) else f'over {executed} runs'}"


def _runs(report: Findings, site: Rewrite) -> int:
    return site.calls if report.graphs[site.graph].compiled else 1


def _rule(site: Rewrite) -> str:
    return " + ".join([site.rule, *(stage for stage in site.stages if stage != site.rule)])


def _source(record: Rewrite | Miss) -> str:
    return record.source or "-"


def _module(record: Rewrite | Miss) -> str:
    return record.module or "-"


def _shape(site: Rewrite) -> str:
    return "[" + ", ".join(str(size) for size in site.shape) + "]"


def _bytes(count: int | None) -> str:
    """Decimal units, three digits: `1.57 MB`."""
    if count is None:
        return "?"
    size, units = float(count), ["kB", "MB", "GB", "TB", "PB"]
    if size < 1000:
        return f"{count} B"
    unit = "B"
    while size >= 999.5 and units:
        size, unit = size / 1000, units.pop(0)
    return f"{size:.3g} {unit}"


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _flat(text: str) -> str:
    return " ".join(text.split())
