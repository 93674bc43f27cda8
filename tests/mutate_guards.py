"""Mutation testing of the guards: with any one refusal taken out, at least one test must fail.

    python tests/mutate_guards.py                 every refusal of the package, about 20 minutes on two cores
    python tests/mutate_guards.py --only stages   those whose place holds the text

Prints one line per mutant and exits 1 when one survives. Not collected by pytest: it runs pytest itself, in copies.
"""

import argparse
import ast
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
import torch._dynamo
import triton  # noqa: F401  imported before the fork, once for all mutants
from torch.fx.experimental import proxy_tensor  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
FILES = [ROOT / "fusionpass" / name for name in ("guards.py", "pattern.py", "verify.py", "cost.py", "engine.py")]
FILES += sorted((ROOT / "fusionpass" / "stages").glob("*.py"))
# Tables first, the mutant's own in front; what they let through meets the slower ones.
TESTS = "guards spellings traps contexts stages rewrite cost region backend direct fuse places".split()
OWN = {"stages": ("guards", "stages", "region"), "cost.py": ("cost",)}
# That every code of the source is documented, and no other, would fail for each mutant and say nothing of the guard.
OPTIONS = ("-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist", "--deselect")
OPTIONS += ("tests/test_spellings.py::test_every_code_is_documented",)


def mutants(path: Path) -> Iterator[tuple[str, str]]:
    """(place, source) with one refusal taken out: the statement that gives it does nothing."""
    source = path.read_text()
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Return | ast.Assign) or node.value is None:
            continue
        refusals = [
            call
            for call in ast.walk(node.value)
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Refusal"
        ]
        if not refusals:
            continue
        code = refusals[0].args[0].value if isinstance(refusals[0].args[0], ast.Constant) else "code"
        indent = " " * node.col_offset
        changed = [*lines[: node.lineno - 1], f"{indent}pass\n", *lines[node.end_lineno :]]
        yield f"{path.relative_to(ROOT)}:{node.lineno} {code}", "".join(changed)


def killed_by(place: str, source: str) -> str:
    """The test that failed with this mutant, "" when none did."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("fusionpass", "kernels", "tests"):
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        (copy / place.partition(":")[0]).write_text(source)
        log = copy / "log"
        child = os.fork()
        if child == 0:
            with open(log, "w") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
                os.chdir(copy)
                sys.path[:0] = [str(copy), str(copy / "tests")]
                own = [name for part, names in OWN.items() if part in place for name in names]
                files = [f"tests/test_{name}.py" for name in dict.fromkeys([*own, *TESTS])]
                status = 1
                with contextlib.suppress(BaseException):
                    status = pytest.main([*OPTIONS, *files])
                sys.stdout.flush()
                os._exit(int(status))
        _, status = os.waitpid(child, 0)
        if status == 0:
            return ""
        failed = [line for line in log.read_text().splitlines() if line.startswith(("FAILED", "ERROR"))]
        return failed[0].split(" - ")[0] if failed else f"status {status}"


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--only", default="", help="mutants whose place holds this text")
    arguments.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    chosen = [mutant for path in FILES for mutant in mutants(path) if given.only in mutant[0]]
    survivors = []

    def judge(mutant: tuple[str, str]) -> None:
        start = time.monotonic()
        by = killed_by(*mutant)
        if not by:
            survivors.append(mutant[0])
        print(f"{mutant[0]}: {by or 'SURVIVED'} ({time.monotonic() - start:.0f} s)", flush=True)

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(judge, chosen))
    print(f"{len(chosen)} mutants, {len(survivors)} survived" + "".join(f"\n  {place}" for place in survivors))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
