"""Random programs beyond those of the suite, without a stop at the first difference.

    python tests/fuzz.py --programs 2500 --seed 1 --keep found     in one shell, and in another
    python tests/fuzz.py --programs 2500 --seed 2 --keep found     the other half of 5,000
    python tests/fuzz.py found/compiled_1_17.py                    a program kept, or any other text

A program that differs is made shorter, line by line, and written to the folder. Exits 1 when one differed.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "0"
    )  # ATen's way on a CPU, as users have it; the suite interprets the kernels
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import fuzz_programs  # noqa: E402
from fuzz_checks import CHECKS, Skipped  # noqa: E402

WEIGHTS = {"compiled": 3, "recorded": 4, "trained": 3, "of_modules": 2, "fused": 1}
PLAINER = (
    ("AROUND", "contextlib.nullcontext()"),
    ("DTYPE", "torch.float32"),
    ("INNER", "'eager'"),
    ("NUMERICS", "'fp32'"),
    ("GRADIENTS", "False"),
    ("TRACER", "'symbolic_trace'"),
    ("TRACER", "'fake'"),
)
SAME = 2  # programs kept with one and the same error, where it is no difference of values
RESET_EVERY = 25  # what Dynamo keeps of older programs; a reset for each would cost as much as a capture


def difference(kind: str, source: str, loud: bool = False) -> str:
    """The traceback of the error that the check raises and its type; "" when there is none."""
    try:
        CHECKS[kind](source)
    except Skipped as reason:
        return f"skipped: {reason}" if loud else ""
    except Exception as error:
        return f"{traceback.format_exc()}{type(error).__name__}: {str(error)[:11]}"
    return ""


def shortened(kind: str, source: str, error: str) -> str:
    """The program without what the difference does not need: plainer settings, then line by line from the last."""

    def as_before(other: str) -> bool:
        torch._dynamo.reset()
        return other != source and type_of(difference(kind, other)) == type_of(error)

    for setting, plain in PLAINER:
        other = re.sub(rf"^{setting} = .*$", f"{setting} = {plain}", source, flags=re.M)
        source = other if as_before(other) else source
    for index in reversed(range(len(source.splitlines()))):
        for other in _without(source.splitlines(), index):
            if as_before(other):
                source = other
                break
    return source


def _without(lines: list[str], index: int) -> Iterator[str]:
    """The text without one line of a body, or with one result of a function alone."""
    line, rest = lines[index], lines[index + 1 :]
    if line.startswith("    return ("):
        for name in line.strip()[len("return (") :].rstrip(")").split(","):
            if name.strip():
                yield "\n".join([*lines[:index], f"    return ({name.strip()},)", *rest, ""])
    elif line.startswith("    ") and not line.startswith("    return"):
        yield "\n".join([*lines[:index], *rest, ""])
        inside = len(line) - len(line.lstrip()) + 4
        if line.endswith(":"):
            yield "\n".join([*lines[:index], *(x[4:] if x.startswith(" " * inside) else x for x in rest), ""])
        name, equals, value = line.strip().partition(" = ")
        if equals and name.isidentifier() and value not in ("a", "g", "P"):
            for simpler in ("a", "g"):
                yield "\n".join([*lines[:index], f"    {name} = {simpler}", *rest, ""])
        if ": " in line and line.strip().startswith("with"):
            yield "\n".join([*lines[:index], "    " + line.partition(": ")[2], *rest, ""])


def type_of(error: str) -> str:
    return error.splitlines()[-1] if error else ""


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument(
        "files", nargs="*", type=Path, help="programs to run again; the name begins with the check's"
    )
    arguments.add_argument("--programs", type=int, default=1000, help="how many to draw")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--keep", type=Path, help="folder for programs that differ")
    arguments.add_argument("--only", choices=tuple(CHECKS), action="append", help="draw for these checks alone")
    arguments.add_argument(
        "--refused", type=int, default=0, metavar="N", help="print the N most frequent reasons to skip"
    )
    given = arguments.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("fusionpass").setLevel(logging.ERROR)  # a program without a site is no news here
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    for path in given.files:
        kind = next(name for name in CHECKS if path.name.startswith(name))
        print(f"{path}: {difference(kind, path.read_text(), loud=True) or 'no difference'}")
    return 0 if given.files else drawn(given)


def drawn(given: argparse.Namespace) -> int:
    kinds = [kind for kind in given.only or WEIGHTS for _ in range(WEIGHTS[kind])]
    counts: Counter[str] = Counter()
    places: Counter[str] = Counter()  # of errors that are no differences of values: one program of each is enough
    refused: Counter[str] = Counter()  # why programs cannot run, so that a table with a slip in it shows
    start = time.monotonic()
    for index in range(given.programs):
        if index % RESET_EVERY == 0:
            torch._dynamo.reset()
        kind = kinds[index % len(kinds)]
        source = getattr(fuzz_programs, kind)(random.Random(f"{given.seed} {index}").choice)
        try:
            sites = CHECKS[kind](source)
            counts[f"{kind}: {'rewritten' if sites else 'without a site'}"] += 1
        except Skipped as reason:
            counts[f"{kind}: cannot run without the pass"] += 1
            refused[f"{kind}: {' '.join(str(reason).split())[:110]}"] += 1
        except Exception as error:
            counts["differ"] += 1
            place = f"{kind}: {type(error).__name__}: {' '.join(str(error).split())[:50].partition('0x')[0]}"
            places[place] += 1
            if "value" in place or places[place] <= SAME:
                kept(given.keep, f"{kind}_{given.seed}_{index}", kind, source)
    seconds = time.monotonic() - start
    print(f"{given.programs} programs in {seconds:.0f} s ({given.programs / seconds:.2f} a second), seed {given.seed}")
    print("\n".join(f"  {name}: {count}" for name, count in sorted(counts.items())))
    print("\n".join(f"    {count} x {reason}" for reason, count in refused.most_common(given.refused)))
    return 1 if counts["differ"] else 0


def kept(folder: Path | None, name: str, kind: str, source: str) -> None:
    torch._dynamo.reset()
    source = shortened(kind, source, difference(kind, source))
    error = difference(kind, source)
    if not error:
        error = "differs only after the programs before it, with their seed and number"
    lines = error.strip().splitlines()
    comment = "".join(f"# {line}\n" for line in lines[-12:])
    print(f"{name}: {lines[-1]}\n{source}", flush=True)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.py").write_text(comment + source)


if __name__ == "__main__":
    sys.exit(main())
