"""Mutation testing of the guards: with a refusal taken out, or an answer about writes turned, a test must fail.

    python tests/mutate_guards.py                   every mutant of the package, over an hour on two cores
    python tests/mutate_guards.py --only stages     those whose place (file, line, function, code) holds the text
    python tests/mutate_guards.py --changed main    those in functions that differ from a git revision, HEAD by default
    python tests/mutate_guards.py --list            their places alone
    python tests/mutate_guards.py --hits /tmp/hits  asks only the tests that come to a mutant's line, which one run of the
                                                    suite notes: the fastest way to judge all of them

First the tests must pass without any change. Then it prints one line per mutant, and exits 1 when one survives. Not
collected by pytest: it runs pytest itself, in copies.
"""

import argparse
import ast
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
import torch._dynamo
import triton  # noqa: F401  imported before the fork, once for all mutants
from torch.fx.experimental import proxy_tensor  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
# Modules that say what a node writes and whose memory it is: their answers are mutated, besides the refusals of any module.
ANSWERS = re.compile("effects|writes|writer|pure|purity|memory|alias|hooks")
# A question by one of these names is answered wrongly by yes, any other by no.
YES_IS_WRONG = re.compile("pure|plain|known|same|owned|identity|equal|torchs_own")
# Tables first, those that name the mutant's code in front; what they let through meets the slower ones, and all others last.
TESTS = "guards spellings near_misses gate_projection_stage traps contexts".split()
TESTS += (
    "finalize_stage residual_stage rms_norm_stage rewrite cost region backend direct direct_graphs fuse places".split()
)
# Never of use against a mutant: they ask the kernels, the command line, whole models, or cost more than they would find.
NOT = "ops ops_gradients ops_public ops_tracers ops_layouts ops_numerics ops_launches ops_gpu".split()
NOT += "ops_backward ops_backward_opcheck ops_backward_logit ops_backward_autograd".split()
NOT += "bench bench_measuring bench_results bench_model cli cli_refusals cli_progress".split()
NOT += "combine combine_layouts combine_refusals combine_gradients combine_launches combine_ungated moe_types".split()
NOT += "packaging examples hugging_face models scaling fuzz contributing".split()
NOT += (
    "inductor ahead_of_time compiles targets no_formula render readme wrong_input caches tracers naming traffic".split()
)
NOT += "notices recompile_limit observe outer copies ops_autocast ops_devices ops_dtypes ops_writes".split()
OWN = {
    "stages": ("guards", "finalize_stage", "residual_stage", "rms_norm_stage", "finalize_rule", "region"),
    "rules/finalize.py": ("finalize_rule",),
    "weighted_sum": ("finalize_stage", "finalize_rule"),
    "norms": ("rms_norm_stage", "finalize_rule"),
    "cost.py": ("cost",),
    "effects": ("traps",),
    "writes": ("traps",),
}
# That every code of the source is documented, and no other, would fail for each mutant and say nothing of the guard.
OPTIONS = ("-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist", "--deselect")
OPTIONS += ("tests/test_spellings.py::test_every_code_is_documented",)


NOT_JUDGED = "NOT JUDGED "
FIRST = 12  # tests


class Mutant(NamedTuple):
    """One change to one file of the package."""

    path: str  # from the root
    line: int
    what: str  # the function and what was done to it
    code: str  # of the refusal taken out, "" for an answer
    source: str  # the file as changed
    around: range  # the lines of the function it is in

    @property
    def place(self) -> str:
        return f"{self.key} {self.what}"

    @property
    def key(self) -> str:
        return f"{self.path}:{self.line}"


def mutants() -> Iterator[Mutant]:
    for path in sorted((ROOT / "fusionpass").rglob("*.py")):
        source = path.read_text()
        if "Refusal(" in source and path.name != "refusal.py":
            yield from refusals(path, source)
        if ANSWERS.search(path.stem):
            yield from answers(path, source)


def refusals(path: Path, source: str) -> Iterator[Mutant]:
    """With one refusal taken out: the statement that gives it does nothing."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Return | ast.Assign | ast.Expr) or node.value is None:
            continue
        found = [
            call for call in ast.walk(node.value) if isinstance(call, ast.Call) and name_of(call.func) == "Refusal"
        ]
        if not found:
            continue
        code = found[0].args[0].value if isinstance(found[0].args[0], ast.Constant) else ""
        # A name that had no value before gets none; in `refusal = refusal or Refusal(...)` it keeps its own.
        fresh = isinstance(node, ast.Assign) and not isinstance(node.value, ast.BoolOp)
        instead = f"{ast.unparse(node.targets[0])} = None" if fresh else "pass"
        yield mutant(path, source, tree, node, instead, f"{{}} without {code or 'a refusal'}", code)


def answers(path: Path, source: str) -> Iterator[Mutant]:
    """With one answer of a function turned to the one that lets a rewrite through, or with one table of names empty."""
    tree = ast.parse(source)
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or function.returns is None:
            continue
        harmless = harmless_answer(function.name, ast.unparse(function.returns))
        if harmless is None:
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != harmless:
                yield mutant(path, source, tree, node, f"return {harmless}", f"{{}} returns {harmless}", "")
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and name_of(node.value.func) == "frozenset"
        ):
            name = ast.unparse(node.targets[0])
            yield mutant(path, source, tree, node, f"{name} = frozenset()", f"{name} is empty", "")


def harmless_answer(name: str, returns: str) -> str | None:
    """What stands for "nothing is written here"; None for a function that answers no such question."""
    if returns == "bool":
        return str(bool(YES_IS_WRONG.search(name)))
    if returns.endswith("| None"):
        return "None"
    if re.match(r"tuple\[.*, bool\]$", returns):
        return "((), False)"
    if re.match(r"(list|Sequence|Iterable)\[Node\]$", returns):
        return "[]"
    return None


def name_of(node: ast.expr) -> str:
    return getattr(node, "id", getattr(node, "attr", ""))


def mutant(path: Path, source: str, tree: ast.Module, node: ast.stmt, instead: str, what: str, code: str) -> Mutant:
    lines = source.splitlines(keepends=True)
    changed = [*lines[: node.lineno - 1], f"{' ' * node.col_offset}{instead}\n", *lines[node.end_lineno :]]
    functions = [
        f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.lineno <= node.lineno <= f.end_lineno
    ]
    inner = max(functions, key=lambda function: function.lineno) if functions else node
    around = range(inner.lineno, inner.end_lineno + 1)
    what = what.format(getattr(inner, "name", "module"))
    return Mutant(str(path.relative_to(ROOT)), node.lineno, what, code, "".join(changed), around)


def changed_lines(revision: str) -> dict[str, set[int]]:
    """The lines of each file of the package that are other than at a git revision."""
    command = ["git", "diff", "--unified=0", "--no-color", revision, "--", "fusionpass"]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    found: dict[str, set[int]] = {}
    for line in text.splitlines():
        if line.startswith("+++ "):
            lines = found.setdefault(line.removeprefix("+++ b/"), set())
        elif hunk := re.match(r"@@ -\S+ \+(\d+)(?:,(\d+))? @@", line):
            start, count = int(hunk[1]), int(hunk[2] or 1)
            lines.update(range(start, start + max(count, 1)))
    return found


def files_for(one: Mutant) -> list[str]:
    """Test files, those most likely to fail first."""
    present = {path.stem.removeprefix("test_"): path for path in sorted((ROOT / "tests").glob("test_*.py"))}
    named = [name for name, path in present.items() if one.code and f'"{one.code}"' in path.read_text()]
    own = [name for part, names in OWN.items() if part in one.path for name in names]
    order = dict.fromkeys([*(n for n in [*own, *named] if n not in NOT), *TESTS, *(n for n in present if n not in NOT)])
    return [f"tests/test_{name}.py" for name in order if name in present]


def copied(copy: Path) -> None:
    for name in ("fusionpass", "kernels", "tests", "examples"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, copy)


def killed_by(one: Mutant, hits: dict[str, list[str]]) -> str:
    """The test that failed with this mutant, "" when none did.

    hits: what `--hits` has found, for the tests that come to the mutant's line at all.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        copied(copy)
        (copy / one.path).write_text(one.source)
        found = hits.get(one.key)
        if hits and found is None and not one.what.endswith(" is empty"):
            return ""  # no test comes to it; a table is read where it is defined
        # Most mutants fall to the first tests. To collect the others takes longer than these run.
        parts = (found[:FIRST], found[FIRST:]) if found else (files_for(one),)
        return next((by for part in parts if part and (by := failed_of(part, copy))), "")


HIT = """import os

_seen = set()


def hit(key):
    here = key, os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    if here[1] and here not in _seen:
        _seen.add(here)
        with open(f"{os.environ['FUSIONPASS_HITS']}.{os.getpid()}", "a") as stream:
            print(*here, sep="\\t", file=stream)
"""


def note_hits(copy: Path, chosen: list[Mutant]) -> int:
    """Run the whole suite on a copy in which each mutant's line notes the test that comes to it, in `copy/hits.*`."""
    copied(copy)
    (copy / "fusionpass" / "_hits.py").write_text(HIT)
    for path in {one.path for one in chosen}:
        lines = (copy / path).read_text().splitlines(keepends=True)
        inside = {one.line: one.key for one in chosen if one.path == path and lines[one.line - 1].startswith(" ")}
        for line in sorted(inside, reverse=True):
            text = lines[line - 1]
            lines.insert(line - 1, f"{text[: len(text) - len(text.lstrip())]}_hit({inside[line]!r})\n")
        start = next(i for i, line in enumerate(lines) if line.startswith(("from ", "import ")))
        start += lines[start].startswith("from __future__")
        lines.insert(start, "from fusionpass._hits import hit as _hit\n")
        (copy / path).write_text("".join(lines))
    environment = {**os.environ, "FUSIONPASS_HITS": str(copy / "hits"), "PYTHONPATH": str(copy)}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal"]
    return subprocess.run(command, cwd=copy, env=environment).returncode


def noted(copy: Path) -> dict[str, list[str]]:
    """By mutant, the tests that come to its line, each file's first one in front."""
    found: dict[str, dict[str, None]] = {}
    for path in sorted(copy.glob("hits.*")):
        for line in path.read_text().splitlines():
            key, _, test = line.partition("\t")
            found.setdefault(key, {})[test] = None
    turns = {}
    for key, tests in found.items():
        by_file: dict[str, list[str]] = {}
        for test in tests:
            by_file.setdefault(test.partition("::")[0], []).append(test)
        cheap = sorted(by_file, key=lambda file: file.removeprefix("tests/test_").removesuffix(".py") in NOT)
        depth = max(map(len, by_file.values()))
        turns[key] = [by_file[file][i] for i in range(depth) for file in cheap if i < len(by_file[file])]
    return turns


def failed_of(tests: list[str], copy: Path) -> str:
    """The first of these tests, or of the tests in these files, that fails with the package in `copy`, "" when none does."""
    log = copy / "log"
    child = os.fork()
    if child == 0:
        with open(log, "w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            os.chdir(copy)
            sys.path[:0] = [str(copy), str(copy / "tests")]
            status = 1
            with contextlib.suppress(BaseException):
                status = pytest.main([*OPTIONS, *tests])
            sys.stdout.flush()
            os._exit(int(status))
    _, status = os.waitpid(child, 0)
    if status == 0:
        return ""
    lines = log.read_text().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if not failed or "error" in lines[-1]:  # no test has judged: files that cannot be collected stop pytest as well
        return NOT_JUDGED + (failed[0].split(" - ")[0] if failed else f"status {status}")
    return failed[0].split(" - ")[0]


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--only", default="", help="mutants whose place holds this text")
    arguments.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    arguments.add_argument(
        "--changed", nargs="?", const="HEAD", metavar="REVISION", help="mutants in changed functions"
    )
    arguments.add_argument(
        "--hits",
        type=Path,
        metavar="FOLDER",
        help="run the suite on a copy that notes there which "
        "tests come to a mutant's line, unless it has been; then ask these alone",
    )
    arguments.add_argument("--trust", action="store_true", help="do not first run the tests without any change")
    arguments.add_argument("--list", action="store_true", help="print the mutants' places and stop")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    chosen = [one for one in mutants() if given.only in one.place]
    if given.changed is not None:
        changed = changed_lines(given.changed)
        chosen = [one for one in chosen if changed.get(one.path, set()) & set(one.around)]
    if given.list:
        print("\n".join(one.place for one in chosen))
        return 0
    hits: dict[str, list[str]] = {}
    if given.hits is not None:
        if not given.hits.exists() and note_hits(given.hits, list(mutants())):
            print(f"without any change a test fails, see {given.hits}: no mutant can be judged")
            return 2
        hits = noted(given.hits)
    unchanged = Mutant("pyproject.toml", 0, "", "", (ROOT / "pyproject.toml").read_text(), range(0))
    if given.hits is None and not given.trust and (failed := killed_by(unchanged, {})):
        print(f"without any change {failed}: no mutant can be judged")
        return 2
    survivors = []

    def judge(one: Mutant) -> None:
        start = time.monotonic()
        by = killed_by(one, hits)
        if not by or by.startswith(NOT_JUDGED):
            survivors.append(one.place)
        print(f"{one.place}: {by or 'SURVIVED'} ({time.monotonic() - start:.0f} s)", flush=True)

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(judge, chosen))
    print(f"{len(chosen)} mutants, {len(survivors)} survived" + "".join(f"\n  {place}" for place in survivors))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
