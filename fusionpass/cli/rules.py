"""`fusionpass rules`: every rule and stage, what it needs, and the codes of its refusals."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tabulate import tabulate

from fusionpass.rules import RULES, Rule, catalog


def rules_text(style: str, rules: Iterable[Rule] = RULES) -> str:
    """The rules as "table", "markdown" or "json"."""
    listed = catalog(rules)
    if style == "json":
        data = [
            {"name": r.name, "kind": r.kind, "formula": r.formula, "needs": list(r.needs), "codes": dict(r.codes)}
            for r in listed
        ]
        return json.dumps({"rules": data}, indent=2)
    shown, wide = ("github", None) if style == "markdown" else ("simple", 76)
    cell = _cell if style == "markdown" else str
    blocks = []
    for rule in listed:
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
