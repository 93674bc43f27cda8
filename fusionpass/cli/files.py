"""Where a command's results go: standard output, or a file that is known to be writable before a long run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fusionpass.targets.types import TargetError


def print_out(text: str) -> None:
    """To standard output; a reader that has seen enough (`| head`) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes standard output once more at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def ensure_writable(output: Path, option: str) -> None:
    """Before a long run, whose result would have nowhere to go.

    Raises:
        TargetError: names the option, the file and what is in the way.
    """
    folder = output.parent
    if not folder.is_dir():
        raise _cannot(output, option, f"there is no folder {str(folder)!r}, make it first")
    if output.is_dir():
        raise _cannot(output, option, "it is a folder, name a file in it")
    if not os.access(output if output.exists() else folder, os.W_OK):
        raise _cannot(output, option, "permission denied, name another file")


def write(output: Path, text: str, option: str) -> None:
    """The text and a newline.

    Raises:
        TargetError: as for `ensure_writable`.
    """
    try:
        output.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise _cannot(output, option, f"{error.strerror}, name another file") from error


def _cannot(output: Path, option: str, why: str) -> TargetError:
    return TargetError(f"{option} {str(output)!r} cannot be written: {why}")
