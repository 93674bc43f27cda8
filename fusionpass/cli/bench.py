"""`fusionpass bench`: measure on a CUDA GPU or take a saved run, show it, keep it, and compare it with a baseline."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from fusionpass.bench.cases import OPS, Case, grid
from fusionpass.bench.check import Comparison, compare
from fusionpass.bench.results import Run
from fusionpass.bench.table import run_text
from fusionpass.cli.bench_model import DEFAULT_ROUNDS, bench_model_command, refuse
from fusionpass.cli.files import ensure_writable, print_out, write
from fusionpass.cli.gpu import ensure_gpu
from fusionpass.cli.progress import Progress
from fusionpass.cli.quiet import quiet

DEFAULT_TOLERANCE = 0.05
# The options that say what is measured, by attribute. For a saved run they have no meaning.
MEASURING = {
    "op": "--op",
    "tokens": "--tokens",
    "hidden": "--hidden",
    "dtype": "--dtype",
    "rounds": "--rounds",
    "sets": "--sets",
    "no_tuned": "--no-tuned",
}


def bench_command(arguments: argparse.Namespace) -> int:
    """The exit code: 0 fine, 1 a ratio has worsened.

    Raises:
        ValueError: bad input or no CUDA GPU, told in one sentence.
    """
    refuse(arguments)
    if arguments.target is not None:
        return bench_model_command(arguments)
    _check_arguments(arguments)
    saved = None if arguments.saved is None else _load(arguments.saved, "--from")
    baseline = None if arguments.check is None else _load(arguments.check, "--check")
    run = _measured(arguments, baseline) if saved is None else saved
    comparison = None if baseline is None else _compared(baseline, run, arguments)
    print_out(run_text(run, arguments.format))
    if arguments.json is not None:
        write(arguments.json, run.to_json(), "--json")
    if arguments.plot is not None:
        from fusionpass.bench.plot import draw_run

        with quiet():
            draw_run(run, arguments.plot)
    return 0 if comparison is None else _judged(comparison, arguments)


def _check_arguments(arguments: argparse.Namespace) -> None:
    """All that can be wrong before anything is read or measured."""
    for name in arguments.op or ():
        if name not in OPS:
            raise ValueError(f"--op {name!r} is unknown: allowed are {', '.join(OPS)}")
    if arguments.tolerance is not None and arguments.check is None:
        raise ValueError("--tolerance has no effect without --check BASELINE.json")
    if arguments.saved is not None:
        for attribute, option in MEASURING.items():
            if getattr(arguments, attribute) not in (None, False):
                raise ValueError(f"{option} has no effect with --from, which shows a saved run: leave one of them out")
    if arguments.plot is not None:
        from fusionpass.bench.plot import SUFFIXES

        if arguments.plot.suffix.lower() not in SUFFIXES:
            raise ValueError(f"--plot {str(arguments.plot)!r} has no suffix of {', '.join(SUFFIXES)}: name the file so")
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError('--plot needs matplotlib: pip install "fusionpass[plot]"')
    for output, option in ((arguments.json, "--json"), (arguments.plot, "--plot")):
        if output is not None:
            ensure_writable(output, option)


def _load(path: Path, option: str) -> Run:
    try:
        return Run.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{option} {str(path)!r} cannot be read: {error.strerror}") from error
    except ValueError as error:  # the text is wrong, or its encoding
        why = f"{error}; give a file that fusionpass bench --json has written"
        raise ValueError(f"{option} {str(path)!r} cannot be used: {why}") from error


def _measured(arguments: argparse.Namespace, baseline: Run | None) -> Run:
    cases = _cases(arguments, baseline)
    ensure_gpu("bench measures kernels", ", or show a saved run with --from RUN.json")
    from fusionpass.bench.run import measure, steps

    with Progress() as progress, quiet():

        def tell(what: str, done: int) -> None:
            progress.stage(what)
            progress.fraction(done, steps(cases))

        rounds = DEFAULT_ROUNDS if arguments.rounds is None else arguments.rounds
        sets = baseline.sets if arguments.sets is None and baseline is not None else arguments.sets
        return measure(cases, rounds=rounds, sets=sets, tuned=not arguments.no_tuned, tell=tell)


def _cases(arguments: argparse.Namespace, baseline: Run | None) -> list[Case]:
    """The requested grid. By default the baseline's own cases, of which --op and --dtype select some."""
    if baseline is None or arguments.tokens or arguments.hidden:
        cases = grid(
            arguments.op and dict.fromkeys(arguments.op),
            arguments.tokens,
            arguments.hidden,
            arguments.dtype or _dtype(baseline),
        )
    else:
        cases = [entry.case for entry in baseline.measurements]
        cases = [case for case in cases if case.op in (arguments.op or OPS)]
        cases = [case for case in cases if case.dtype == (arguments.dtype or case.dtype)]
    if baseline is not None and not {entry.case for entry in baseline.measurements}.intersection(cases):
        raise _nothing_in_common(arguments)
    return cases


def _dtype(baseline: Run | None) -> str:
    return baseline.measurements[0].dtype if baseline is not None and baseline.measurements else "bf16"


def _compared(baseline: Run, run: Run, arguments: argparse.Namespace) -> Comparison:
    if baseline.sets != run.sets:
        raise ValueError(
            f"--check {str(arguments.check)!r} was measured with {_sets(baseline)}, the run with {_sets(run)}: ratios with "
            "operands in the cache and out of it cannot be compared; leave --sets out to measure as the baseline was"
        )
    found = compare(baseline, run, _tolerance(arguments))
    if found.ratios == 0:
        raise _nothing_in_common(arguments)
    if baseline.device != run.device:
        print(f"note: {arguments.check} was measured on {baseline.device}, this run on {run.device}", file=sys.stderr)
    return found


def _sets(run: Run) -> str:
    return "no --sets" if run.sets is None else f"--sets {run.sets}"


def _judged(found: Comparison, arguments: argparse.Namespace) -> int:
    """One line on standard error per worsened ratio, or one line that says how many ratios were compared."""
    for worsened in found.worsened:
        print(worsened.line(_tolerance(arguments)), file=sys.stderr)
    if found.worsened:
        return 1
    counted = f"{found.ratios} ratios of {found.cases} case{'' if found.cases == 1 else 's'}"
    print(f"{arguments.check}: {counted} compared, none has worsened", file=sys.stderr)
    return 0


def _tolerance(arguments: argparse.Namespace) -> float:
    return DEFAULT_TOLERANCE if arguments.tolerance is None else arguments.tolerance


def _nothing_in_common(arguments: argparse.Namespace) -> ValueError:
    return ValueError(
        f"--check {str(arguments.check)!r} has no op, shape and dtype in common with the run: name others, or leave "
        "--op, --tokens, --hidden and --dtype out to measure the baseline's own"
    )
