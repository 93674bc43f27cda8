"""One line on a terminal that says what a long command is doing. Elsewhere it shows nothing."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from types import TracebackType
from typing import TextIO

PERIOD_S = 0.2
PATIENCE_S = 1.0  # a command that is done before this shows nothing
BAR = 20  # characters


class Progress:
    """`with Progress() as progress:` shows the stage and the elapsed seconds, and clears the line at the end."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = sys.stderr if stream is None else stream
        self._stage = ""
        self._bar = ""
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._shown = 0

    def stage(self, text: str) -> None:
        self._stage = text

    def fraction(self, done: int, total: int) -> None:
        """Show a bar beside the stage: `done` of `total` steps are done."""
        filled = BAR * done // total
        self._bar = f" [{'#' * filled}{'.' * (BAR - filled)}] {done}/{total}"

    def __enter__(self) -> Progress:
        if self._stream is not None and self._stream.isatty():
            self._thread = threading.Thread(target=self._tick, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self._show("")

    def _tick(self) -> None:
        start = time.monotonic()
        while not self._done.wait(PERIOD_S):
            elapsed = time.monotonic() - start
            if elapsed >= PATIENCE_S:
                graphs = _graphs_so_far() if self._stage == "capturing" else ""
                self._show(f"{self._stage}{graphs} ...{self._bar} {elapsed:.0f} s")

    def _show(self, text: str) -> None:
        text = text[: shutil.get_terminal_size().columns - 1]  # a wrapped line could not be erased
        if text or self._shown:
            self._stream.write("\r" + text.ljust(self._shown) + ("" if text else "\r"))
            self._stream.flush()
            self._shown = len(text)


def _graphs_so_far() -> str:
    """Dynamo's own count, read without importing it."""
    utils = sys.modules.get("torch._dynamo.utils")
    count = utils.counters["stats"].get("unique_graphs", 0) if utils is not None else 0
    return f", {count} graph{'' if count == 1 else 's'} so far" if count else ""
