"""`--diff`: every rewritten graph's code before and after, as a unified diff."""

from __future__ import annotations

import difflib
import html
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusionpass.report import Report


def diffs(report: Report, context: int = 3) -> str:
    """The unified diffs of all graphs whose code changed, one after the other."""
    texts = []
    for graph in report.graphs:
        before, after = (graph.code_before or "").splitlines(), (graph.code_after or "").splitlines()
        names = f"graph {graph.index} before", f"graph {graph.index} after"
        texts += difflib.unified_diff(before, after, *names, n=context, lineterm="")
    return "\n".join(line.rstrip() for line in texts) or "no graph changed"


def appended(text: str, report: Report, style: str) -> str:
    """`text` with the diff after it, in the way in which its format shows code. JSON has the code in its graphs already."""
    if style == "json":
        return text
    changed = diffs(report)
    if style == "markdown":
        return f"{text}\n\n### Diff\n\n```diff\n{changed}\n```"
    if style == "html":
        return f"{text}\n<h3>Diff</h3>\n<pre>{html.escape(changed)}</pre>"
    return f"{text}\n\n{changed}"
