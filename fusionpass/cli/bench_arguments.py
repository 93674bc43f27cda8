"""The arguments and the help of `fusionpass bench`. It imports nothing that takes time."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from fusionpass.bench import MODES
from fusionpass.cli.numbers import is_whole, whole_number

DESCRIPTION = """\
With a TARGET, a Hugging Face model type, folder or hub id: ms per decode step of the whole model with random weights
and a static cache, in eager, torch.compile and torch.compile(mode="reduce-overhead"), without fusionpass and with it.

Without a TARGET: measure every op on a CUDA GPU, on a grid of shapes [T, H], against eager, torch.compile, torch.compile
with coordinate_descent_tuning, and the limit that the bandwidth of a device copy sets.

GPU time is the time of CUDA-graph replays over rotating buffers, CPU time that of plain calls. Each side's result is
compared with float64 before it is timed. The whole default grid compiles about 200 functions and takes a while; --op,
--tokens, --hidden and --no-tuned make it shorter."""

EPILOG = """\
examples:
  fusionpass bench qwen2_moe --layers 4 --batch 1,32 --experts batched_mm
  fusionpass bench qwen3_next --layers 12 --compile-time --mode default
  fusionpass bench --op gated_add,gate_projected_add --tokens 1,32,256 --hidden 4096
  fusionpass bench --json run.json --plot run.png --format markdown
  fusionpass bench --check run.json --tolerance 5%
      measures the cases of run.json again and exits 1 if a ratio such as here/compile has worsened by more
  fusionpass bench --from run.json --plot run.svg
      shows a saved run; needs no GPU

--check compares ratios, not microseconds, and reports no difference below the noise. A ratio's noise is its value times
the sum of both sides' relative spreads. The noises of the two runs are added.

exit codes: 0 fine; 1 a ratio has worsened; 2 bad input or no CUDA GPU
"""


EXPERTS_HELP = "how transformers computes the experts: grouped_mm, batched_mm, eager, ...; default: the model's own"


def add_bench(bench: argparse.ArgumentParser) -> None:
    """Everything but the name, the description and the epilog."""
    bench.add_argument("target", nargs="?", metavar="TARGET", help="a whole model; without it, the single ops")
    model = bench.add_argument_group("a whole model")
    model.add_argument("--layers", type=_sets, metavar="N", help="keep the first N layers; default: all")
    model.add_argument("--experts", metavar="NAME", help=f"{EXPERTS_HELP}; generate decodes with batched_mm")
    model.add_argument("--batch", type=_sizes, metavar="B,B", help="sequences to decode; default: 1,8,32,128")
    model.add_argument(
        "--prefill",
        type=_sizes,
        metavar="T,T",
        help="a prefill of one sequence of T tokens; no decode then, unless --batch asks for it",
    )
    model.add_argument(
        "--mode",
        type=_modes,
        metavar="NAME,NAME",
        help=f"some of {', '.join(MODES)}; default: all, with two compilations each, except eager",
    )
    model.add_argument(
        "--compile-time",
        action="store_true",
        help="seconds that torch.compile takes, without fusionpass and with it, instead of ms per step",
    )
    what = bench.add_argument_group("what is measured")
    what.add_argument(
        "--op",
        action="extend",
        type=_names,
        metavar="NAME",
        help="cases, such as moe_combine or gated_add_backward (an unknown name lists them all); repeat or separate by "
        "commas; default: all",
    )
    what.add_argument(
        "--tokens",
        type=_sizes,
        metavar="T,T",
        help="rows; default: 1,8,32,64,256,1024,8192, for the backward those from 256 up",
    )
    what.add_argument("--hidden", type=_sizes, metavar="H,H", help="elements of a row; default: 2048,4096,7168")
    what.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16, or the baseline's")
    what.add_argument("--rounds", type=_rounds, metavar="N", help="samples of each time; default: 7")
    what.add_argument(
        "--sets",
        type=_sets,
        metavar="N",
        help="rotate through N sets of operands. A few sets stay in the L2 cache, as in decode, where the kernels before "
        "have just written the operands; default: enough for one turn to read twice the cache, at most 128",
    )
    what.add_argument("--no-tuned", action="store_true", help="leave out coordinate_descent_tuning, the slow compile")
    what.add_argument("--from", dest="saved", type=_file, metavar="RUN.json", help="show a saved run, measure nothing")
    output = bench.add_argument_group("output")
    output.add_argument("--format", choices=("table", "markdown"), default="table", help="default: table")
    output.add_argument("--json", type=_file, metavar="FILE", help="save the run to FILE")
    output.add_argument(
        "--plot", type=_file, metavar="FILE", help="draw the run to FILE, whose suffix is .png, .svg or .pdf"
    )
    judge = bench.add_argument_group("comparison")
    judge.add_argument(
        "--check",
        type=_file,
        metavar="BASELINE.json",
        help="exit 1 if a ratio is worse than in this saved run; measures its cases unless --tokens or --hidden is given",
    )
    judge.add_argument(
        "--tolerance", type=_tolerance, metavar="P", help="how much a ratio may grow, as 5%% or 0.05; default: 5%%"
    )


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names no op")
    return names


def _modes(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in MODES:
            raise argparse.ArgumentTypeError(f"{name!r} is no mode: allowed are {', '.join(MODES)}")
    return [mode for mode in MODES if mode in names]


def _sizes(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(is_whole(word) and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers from 1 up, such as 1,32,256")
    return sorted({int(word) for word in words})


def _rounds(text: str) -> int:
    return whole_number(text, 2, ": one sample has no spread")


def _sets(text: str) -> int:
    return whole_number(text, 1)


def _file(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the name is empty: name a file")
    return Path(text)


def _tolerance(text: str) -> float:
    """A percentage, or a fraction below 1. A plain 5 is refused, since it could mean either."""
    percent = text.endswith("%")
    try:
        value = float(text[:-1] if percent else text)
    except ValueError:
        value = math.nan
    if not (0 <= value < math.inf and (percent or value < 1)):
        wanted = "a percentage such as 5% nor a fraction below 1 such as 0.05"
        raise argparse.ArgumentTypeError(f"{text!r} is neither {wanted}")
    return value / 100 if percent else value
