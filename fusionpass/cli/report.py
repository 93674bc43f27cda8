"""`fusionpass report`: resolve the target, capture it once, render, and judge the expectation."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fusionpass.cli.advice import advice, given
from fusionpass.cli.diff import appended
from fusionpass.cli.files import ensure_writable, print_out, write
from fusionpass.cli.progress import Progress
from fusionpass.cli.quiet import TRACEBACK, quiet
from fusionpass.errors import VerificationFailed
from fusionpass.report import Report
from fusionpass.report.render import summary
from fusionpass.report.wording import count
from fusionpass.targets.types import Target, TargetError, one_line

SUFFIXES = {".json": "json", ".md": "markdown", ".html": "html", ".htm": "html"}


def report_command(arguments: argparse.Namespace) -> int:
    """The exit code: 0 fine, 1 expectation not met.

    Raises:
        ValueError: bad input, told in one sentence.
    """
    if arguments.output == "":
        raise TargetError("-o '' is empty: name a file")
    output = None if arguments.output in (None, "-") else Path(arguments.output)
    if output is not None:
        ensure_writable(output, "-o")
    style = arguments.format or SUFFIXES.get(output.suffix.lower() if output else "", "table")
    with Progress() as progress, quiet():
        options = _options(arguments)
        progress.stage(f"building {arguments.target}")
        target = _resolve(arguments)
        progress.stage("capturing")
        try:
            report = _capture(target, options, arguments)
        except VerificationFailed as error:
            print(f"fusionpass report {arguments.target}: {error}", file=sys.stderr)
            return 1
        progress.stage("rendering")
        text = _rendered(report, style, arguments.diff)
    if arguments.verify:
        number = count(len(report.rewrites), "rewritten site")
        print(f"note: verified: {number} computed what the replaced nodes do, on random inputs", file=sys.stderr)
    for note in target.notes:
        print(f"note: {note}", file=sys.stderr)
    if arguments.layers is not None and not report.rewrites:
        few = f"--layers {arguments.layers} keeps the first {count(arguments.layers, 'layer')}"
        print(f"note: {few}, and in some models these are dense: try a larger number", file=sys.stderr)
    if output is None:
        print_out(text)
    else:
        write(output, text, "-o")
        print(f"{output}: {summary(report)}", file=sys.stderr)
    return _judged(report, arguments)


def _options(arguments: argparse.Namespace) -> dict[str, object]:
    """The pass's options, checked before anything is built."""
    from fusionpass.options import Options

    options: dict[str, object] = {"inner": arguments.inner, "numerics": arguments.numerics}
    if arguments.verify:
        options["verify"] = True
    if arguments.rules is not None:
        options["rules"] = [name.strip() for name in arguments.rules.split(",") if name.strip()]
    Options.from_user(options)
    return options


def _resolve(arguments: argparse.Namespace) -> Target:
    from fusionpass.targets import resolve

    return resolve(
        arguments.target,
        layers=arguments.layers,
        tokens=arguments.tokens,
        batch=arguments.batch,
        experts=arguments.experts,
        dtype=arguments.dtype,
        device=arguments.device,
        input_specs=arguments.input,
        trust_remote_code=arguments.trust_remote_code,
    )


def _capture(target: Target, options: dict[str, object], arguments: argparse.Namespace) -> Report:
    """The report on one captured call of the target."""
    keep_code = arguments.diff
    try:
        with target.capturing():
            if target.program is not None:
                return _rewritten(target, options, keep_code)
            from fusionpass.entry.explain import capture

            call = (target.model, target.args, dict(target.kwargs))
            return capture(*call, target=target.name, keep_code=keep_code, **options)
    except (VerificationFailed, KeyboardInterrupt):
        raise
    except BaseException as error:  # the target's own code runs here. It may raise anything, or call sys.exit
        raise TargetError(
            f"{given(target, arguments)} cannot be captured: {one_line(error)}; "
            f"{advice(target, arguments, error)}{TRACEBACK}=1 shows the traceback"
        ) from error


def _rewritten(target: Target, options: dict[str, object], keep_code: bool) -> Report:
    from fusionpass.entry.rewrite import rewrite

    before = target.program.graph_module.print_readable(print_output=False) if keep_code else None
    program, report = rewrite(target.program, **options)
    report.target = target.name
    if keep_code and report.graphs:
        report.graphs[0].code_before = before
        report.graphs[0].code_after = program.graph_module.print_readable(print_output=False)
    return report


def _rendered(report: Report, style: str, diff: bool) -> str:
    render = {"json": report.to_json, "markdown": report.to_markdown, "html": report.to_html, "table": report.__str__}
    text = render[style]()
    return appended(text, report, style) if diff else text


def _judged(report: Report, arguments: argparse.Namespace) -> int:
    """Compare the count with `--expect` and `--strict`. If they are not met, one line on standard error says so."""
    captured, found = len(report.rewrites), report.executed
    if arguments.expect is not None and found != arguments.expect:
        shared = f" ({captured} captured, shared by layers)" if captured != found else ""
        if captured == 0:
            why = report.why_nothing()
        elif report.misses:
            reasons = [f"{count} x {miss.code} ({miss.reason})" for count, miss in report.top_reasons()]
            why = f"near misses: {'; '.join(reasons)}"
        else:
            why = "no near misses"
        line = f"expected {count(arguments.expect, 'rewritten site')}, found {found}{shared}; {why}"
    elif arguments.strict and captured == 0:
        line = f"--strict: {report.why_nothing()}"
    else:
        return 0
    print(f"fusionpass report {arguments.target}: {' '.join(line.split())}", file=sys.stderr)
    return 1
