"""Ctrl-C inside the command: exit code 130 and no traceback, also if other code has swallowed the interrupt."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fusionpass._start import INTERRUPTED

__all__ = ["INTERRUPTED", "Interrupts", "interrupts"]


class Interrupts:
    """Whether Ctrl-C was pressed. A compiler may raise another error for it, and a callback of C code drops it."""

    pressed = False

    def __call__(self, number: int, frame: Any) -> None:
        self.pressed = True
        raise KeyboardInterrupt


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Count Ctrl-C inside the block, if Python's own handler is set. Another handler of the caller stays."""
    found = Interrupts()
    hook = sys.unraisablehook
    ours = _is_pythons(signal.getsignal(signal.SIGINT)) and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, found) if ours else None

    def quiet_hook(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            hook(unraisable)

    sys.unraisablehook = quiet_hook
    try:
        yield found
    finally:
        sys.unraisablehook = hook
        if ours:
            signal.signal(signal.SIGINT, before)


def _is_pythons(handler: Any) -> bool:
    from fusionpass import _start

    return handler in (signal.default_int_handler, _start._leave)
