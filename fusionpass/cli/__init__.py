"""The command `fusionpass`: its arguments, its help and its exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from fusionpass._version import __version__
from fusionpass.cli import bench_arguments
from fusionpass.cli.bench_arguments import EXPERTS_HELP
from fusionpass.cli.interrupt import INTERRUPTED, Interrupts, interrupts
from fusionpass.cli.numbers import whole_number

DESCRIPTION = """\
Find the end of a Mixture-of-Experts layer in a model's graph (the weighted sum over the experts, the shared expert with
a gate or without, the residual add, the norm), swap it for one kernel, and say which nodes were rewritten, which were
left alone, and why."""

EPILOG = """\
examples:
  fusionpass report qwen3_next
      the 48 layers of the default Qwen3-Next config, on the meta device: no weights, no download, no GPU
  fusionpass report mymodel.py:Block --dtype bf16 --input "bf16[64,2048]" --diff
      your own module, with the graph's code before and after
  fusionpass report ./checkpoint --layers 4 --expect 4 --format json -o report.json
      a folder with a config.json, cut to 4 layers; exits 1 unless 4 sites are rewritten, to check the count in CI
  fusionpass bench --op gate_projected_add --tokens 1,32 --hidden 4096
      GPU and CPU time of an op beside eager and torch.compile, on a machine with a CUDA GPU

exit codes:
  0  fine
  1  expectation not met: --expect N and another count, --strict and nothing rewritten, --check and a worse ratio
  2  bad input; one line on standard error says what is wrong
"""

REPORT_DESCRIPTION = """\
Capture TARGET with torch.compile, run the pass, and report every site, every near miss and every graph break.

TARGET is one of
  qwen3_next             a Hugging Face model type: built from its default config
  ./folder  org/name     a folder with a config.json, or a hub id (its config.json is read from the network)
  file.py:name           an nn.Module, its class, a function, or a function of no arguments that returns a module;
  package.module:name    inputs come from example_inputs beside it (a tuple or dict, or a function that returns one)
                         or from --input
  model.pt2              an archive written by torch.export.save

Which targets run code: file.py:name and package.module:name run that Python code. Hugging Face targets run only
transformers' own code, unless --trust-remote-code is given. A .pt2 archive is read and not run; give only archives
that you trust."""

REPORT_EPILOG = """\
examples:
  fusionpass report qwen2_moe --layers 2
  fusionpass report moe.py:make_block --input "bf16[64,2048]" --input "i64[2,9]" --format markdown -o report.md
  fusionpass report qwen3_next --expect 48

Model types of your transformers: python -c 'from transformers import CONFIG_MAPPING; print(*CONFIG_MAPPING)'
FUSIONPASS_TRACEBACK=1 shows the traceback behind a one-line error, TORCH_LOGS and TRANSFORMERS_VERBOSITY the logs.

exit codes: 0 fine; 1 --expect or --strict not met; 2 bad input
"""


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with an argument. argparse itself would print the usage first."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help\n")


class _CommandParser(_Parser):
    """A command's own arguments. It reports unknown ones itself; argparse would leave this to `fusionpass`."""

    def parse_known_args(self, args=None, namespace=None):
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def parser() -> argparse.ArgumentParser:
    """The arguments of `fusionpass`."""
    raw = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    top = _Parser(prog="fusionpass", description=DESCRIPTION, epilog=EPILOG, **raw)
    top.add_argument("--version", action="version", version=f"fusionpass {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_CommandParser)
    report = commands.add_parser(
        "report",
        help="capture a model and say what the pass does to it",
        description=REPORT_DESCRIPTION,
        epilog=REPORT_EPILOG,
        **raw,
    )
    _add_report(report)
    rules = commands.add_parser(
        "rules",
        help="list every rule and stage: formula, what it needs, its miss codes",
        description="List every rule and stage: formula, what it needs, and the codes of its near misses.",
        **raw,
    )
    rules.add_argument("--format", choices=("table", "json", "markdown"), default="table", help="default: table")
    bench = commands.add_parser(
        "bench",
        help="measure the ops on a CUDA GPU against eager and torch.compile",
        description=bench_arguments.DESCRIPTION,
        epilog=bench_arguments.EPILOG,
        **raw,
    )
    bench_arguments.add_bench(bench)
    return top


def _add_report(report: argparse.ArgumentParser) -> None:
    report.add_argument("target", metavar="TARGET", help="what to capture, see above")
    output = report.add_argument_group("output")
    output.add_argument(
        "--format",
        choices=("table", "json", "markdown", "html"),
        help="default: by the suffix of -o (.json, .md, .html), else table",
    )
    output.add_argument(
        "-o", "--output", metavar="FILE", help="write the report to FILE and one line to standard error"
    )
    output.add_argument(
        "--diff", action="store_true", help="add the graphs' code before and after (JSON: in its graphs)"
    )
    judge = report.add_argument_group("expectations")
    judge.add_argument(
        "--expect",
        type=_count_from(0),
        metavar="N",
        help="exit 1 unless N rewritten sites ran: one per layer, also where layers share one captured graph",
    )
    judge.add_argument("--strict", action="store_true", help="exit 1 when nothing was rewritten")
    judge.add_argument(
        "--verify",
        action="store_true",
        help="run each site's op and the nodes it replaces on random inputs; exit 1 if their results differ",
    )
    sizes = report.add_argument_group("Hugging Face targets")
    sizes.add_argument(
        "--layers", type=_count_from(1), metavar="N", help="keep the first N decoder layers; default: all"
    )
    sizes.add_argument("--tokens", type=_count_from(1), metavar="N", help="tokens of each sequence; default: 16")
    sizes.add_argument("--batch", type=_count_from(1), metavar="N", help="sequences; default: 1")
    sizes.add_argument("--experts", metavar="NAME", help=EXPERTS_HELP)
    sizes.add_argument("--trust-remote-code", action="store_true", help="run model code that comes with the target")
    code = report.add_argument_group("model and inputs")
    code.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16; Python code: as it is")
    code.add_argument("--device", metavar="cpu|cuda|meta", help="default: meta, no weights; Python code: as it is, cpu")
    code.add_argument(
        "--input",
        action="append",
        metavar="SPEC",
        help='an input of Python code as dtype[sizes], such as "bf16[64,2048]" or "i64[2,9]"; repeat for each',
    )
    options = report.add_argument_group("the pass")
    options.add_argument(
        "--inner", default="eager", metavar="NAME", help="compiler of the rewritten graph; default: eager"
    )
    options.add_argument("--rules", metavar="A,B", help="rules and stages to allow, see fusionpass rules; default: all")
    options.add_argument(
        "--numerics",
        choices=("fp32", "eager"),
        default="fp32",
        help="fp32 rounds once, at the store; eager gives the bits of the unfused nodes; default: fp32",
    )


def _count_from(least: int):
    def count(text: str) -> int:
        return whole_number(text, least)

    return count


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    with interrupts() as ctrl_c:
        try:
            status = _main(argv, ctrl_c)
        except KeyboardInterrupt:
            return INTERRUPTED
        return INTERRUPTED if ctrl_c.pressed else status


def _main(argv: Sequence[str] | None, ctrl_c: Interrupts) -> int:
    try:
        arguments = parser().parse_args(argv)
    except SystemExit as done:  # argparse leaves in this way, also after --help and --version
        return done.code if isinstance(done.code, int) else 2
    from fusionpass.cli.quiet import wants_traceback

    try:
        return _run(arguments)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # for any error the user reads one line; the variable shows the rest
        if wants_traceback():
            import traceback

            traceback.print_exc()
            return 2
        if not ctrl_c.pressed:
            print(f"fusionpass {arguments.command}: {_sentence(error)}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal with another encoding shows missing characters as \\x escapes
            stream.reconfigure(errors="backslashreplace")
    if arguments.command == "rules":
        from fusionpass.cli.files import print_out
        from fusionpass.cli.rules import rules_text

        print_out(rules_text(arguments.format))
        return 0
    if arguments.command == "bench":
        from fusionpass.cli.bench import bench_command

        return bench_command(arguments)
    from fusionpass.cli.report import report_command

    return report_command(arguments)


def _sentence(error: BaseException) -> str:
    """The error in one line. Ours are sentences already. Any other gets its type, and how to see its traceback."""
    from fusionpass.targets.types import TargetError, one_line

    if type(error) in (TargetError, ValueError):
        return " ".join(str(error).split())
    return f"{one_line(error)}; FUSIONPASS_TRACEBACK=1 shows the traceback"


if __name__ == "__main__":
    sys.exit(main())
