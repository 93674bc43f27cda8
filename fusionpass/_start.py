"""Ctrl-C while torch is imported, which takes seconds: the command ends quietly, any other program ends as always.

The package is imported before the command can handle anything, so this runs first of all.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

INTERRUPTED = 130  # 128 + SIGINT, as shells give it


def is_command() -> bool:
    """Whether this process is the command `fusionpass`, by its script or by `python -m fusionpass`."""
    if not sys.argv:
        return False
    if sys.argv[0] == "-m":  # Python puts it there until it has found the module
        return sys.orig_argv[-len(sys.argv)].partition(".")[0] == "fusionpass"
    return os.path.splitext(os.path.basename(sys.argv[0]))[0] == "fusionpass"


def leave_quietly_if_command() -> None:
    """Have Ctrl-C end the command at once. Its `main` brings Python's own handler back."""
    if is_command() and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _leave)


def _leave(number: int, frame: object) -> None:
    os._exit(INTERRUPTED)  # an exception in the import of a C extension may turn into another one, or abort the process
