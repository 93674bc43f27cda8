"""Random programs beyond those of the suite, without a stop at the first difference.

    python tests/fuzz.py --programs 2500 --seed 1 --keep found     in one shell, and in another
    python tests/fuzz.py --programs 2500 --seed 2 --keep found     the other half of 5,000
    python tests/fuzz.py found/compiled_1_17.py                    a program kept, or any other text

A program that differs is made shorter, line by line, and written to the folder. Exits 1 when one differed.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "0")  # ATen's way on a CPU, as users have it; the suite interprets the kernels
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import fuzz_programs
from fuzz_checks import CHECKS, Skipped

WEIGHTS = {"compiled": 3, "recorded": 4, "trained": 3, "of_modules": 2}
RESET_EVERY = 25  # what Dynamo keeps of older programs; a reset for each would cost as much as a capture


def difference(kind: str, source: str) -> str:
    """The last line of the error that the check raises, "" when there is none."""
    try:
        CHECKS[kind](source)
    except Skipped:
        return ""
    except Exception:
        return traceback.format_exc()
    return ""


def shortened(kind: str, source: str, error: str) -> str:
    """The program without the lines that the difference does not need."""
    last = type_of(error)
    lines = source.splitlines(keepends=True)
    index = len(lines) - 1
    while index >= 0:
        fewer = [*lines[:index], *lines[index + 1 :]]
        if lines[index].startswith("    ") and not lines[index].startswith("    return") and _same(kind, fewer, last):
            lines = fewer
            index = min(index, len(lines))
        index -= 1
    return "".join(lines)


def _same(kind: str, lines: list[str], last: str) -> bool:
    torch._dynamo.reset()
    return type_of(difference(kind, "".join(lines))) == last


def type_of(error: str) -> str:
    return error.strip().splitlines()[-1].partition(":")[0] if error else ""


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("files", nargs="*", type=Path, help="programs to run again; the name begins with the check's")
    arguments.add_argument("--programs", type=int, default=1000, help="how many to draw")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--keep", type=Path, help="folder for programs that differ")
    arguments.add_argument("--only", choices=tuple(CHECKS), action="append", help="draw for these checks alone")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for path in given.files:
        kind = next(name for name in CHECKS if path.name.startswith(name))
        print(f"{path}: {difference(kind, path.read_text()) or 'no difference'}")
    return 0 if given.files else drawn(given)


def drawn(given: argparse.Namespace) -> int:
    kinds = [kind for kind in given.only or WEIGHTS for _ in range(WEIGHTS[kind])]
    counts: Counter[str] = Counter()
    start = time.monotonic()
    for index in range(given.programs):
        if index % RESET_EVERY == 0:
            torch._dynamo.reset()
        kind = kinds[index % len(kinds)]
        source = getattr(fuzz_programs, kind)(random.Random(f"{given.seed} {index}").choice)
        try:
            sites = CHECKS[kind](source)
            counts[f"{kind}: {'rewritten' if sites else 'without a site'}"] += 1
        except Skipped:
            counts[f"{kind}: cannot run without the pass"] += 1
        except Exception:
            counts["differ"] += 1
            kept(given.keep, f"{kind}_{given.seed}_{index}", kind, source, traceback.format_exc())
    seconds = time.monotonic() - start
    print(f"{given.programs} programs in {seconds:.0f} s ({given.programs / seconds:.2f} a second), seed {given.seed}")
    print("\n".join(f"  {name}: {count}" for name, count in sorted(counts.items())))
    return 1 if counts["differ"] else 0


def kept(folder: Path | None, name: str, kind: str, source: str, error: str) -> None:
    source = shortened(kind, source, error)
    error = difference(kind, source) or error
    comment = "".join(f"# {line}\n" for line in error.strip().splitlines()[-12:])
    print(f"{name}: {error.strip().splitlines()[-1]}\n{source}", flush=True)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.py").write_text(comment + source)


if __name__ == "__main__":
    sys.exit(main())
