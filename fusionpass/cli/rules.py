"""`fusionpass rules`: every rule and stage, what it needs, and the codes of its refusals."""

from __future__ import annotations

import json

from tabulate import tabulate

from fusionpass.catalog import RULES


def rules_text(style: str) -> str:
    """The catalog as "table", "markdown" or "json"."""
    if style == "json":
        rules = [
            {"name": r.name, "kind": r.kind, "formula": r.formula, "needs": list(r.needs), "codes": dict(r.codes)}
            for r in RULES
        ]
        return json.dumps({"rules": rules}, indent=2)
    shown, wide = ("github", None) if style == "markdown" else ("simple", 76)
    cell = _cell if style == "markdown" else str
    blocks = []
    for rule in RULES:
        title = f"{rule.name} ({rule.kind})"
        facts = [["formula", cell(rule.formula)], *(["needs", cell(need)] for need in rule.needs)]
        codes = [[cell(code), cell(meaning)] for code, meaning in rule.codes.items()]
        tables = []
        for rows, heads in ((facts, (title, "")), (codes, ("miss code", "meaning"))):
            if rows:
                tables.append(tabulate(rows, heads, tablefmt=shown, disable_numparse=True, maxcolwidths=[None, wide]))
        blocks.append("\n\n".join(tables))
    return "\n\n\n".join(blocks)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*")
