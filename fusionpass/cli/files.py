"""Where a command's results go: standard output, or a file. Before a long run the file is checked to be writable."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fusionpass.targets.types import TargetError


def print_out(text: str) -> None:
    """Write to standard output. A reader that stops early (`| head`) is no error.

    Raises:
        TargetError: standard output takes nothing more, as on a full disk.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        # Python flushes standard output once more at exit. This must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise TargetError(f"standard output cannot be written: {_why(error)}, use -o FILE elsewhere") from error


def ensure_writable(output: Path, option: str) -> None:
    """Check the file before a long run, so that the result can be written after it.

    Raises:
        TargetError: names the option, the file and what is in the way.
    """
    try:
        obstacle = _obstacle(output)
    except OSError as error:
        obstacle = f"{_why(error)}, name another file"
    if obstacle:
        raise _cannot(output, option, obstacle)


def _obstacle(output: Path) -> str:
    folder = output.parent
    if not folder.is_dir():
        return f"there is no folder {str(folder)!r}, make it first"
    if output.is_dir():
        return "it is a folder, name a file in it"
    if not output.exists() or output.is_file():  # opening a pipe or a device may block until its other end is open
        _open_once(output)
    return ""


def _open_once(output: Path) -> None:
    """Open it for writing and leave everything as it was. The error shows whether the file system is read-only or a
    permission is missing."""
    is_new = not output.exists()
    with open(output, "ab"):
        pass
    if is_new:
        output.unlink()


def write(output: Path, text: str, option: str) -> None:
    """Write the text and a newline.

    Raises:
        TargetError: as for `ensure_writable`.
    """
    try:
        output.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise _cannot(output, option, f"{_why(error)}, name another file") from error


def _why(error: OSError) -> str:
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:]


def _cannot(output: Path, option: str, why: str) -> TargetError:
    return TargetError(f"{option} {str(output)!r} cannot be written: {why}")
