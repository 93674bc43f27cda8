"""Keep standard output for the report: prints go to standard error, and messages of libraries are not shown.

The remarks of libraries (a fast path is missing, a function recompiles) would hide the report. A real problem arrives as an
exception, and is shown. TORCH_LOGS, TRANSFORMERS_VERBOSITY or FUSIONPASS_TRACEBACK in the environment brings all
messages back. PYTHONWARNINGS (or -W) brings the warnings back.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

TRACEBACK = "FUSIONPASS_TRACEBACK"
_LOUD = ("TORCH_LOGS", "TRANSFORMERS_VERBOSITY", TRACEBACK)


def wants_traceback() -> bool:
    return os.environ.get(TRACEBACK, "") not in ("", "0")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No log record, no warning and no print of the code that runs inside reaches standard output."""
    with contextlib.ExitStack() as stack:
        if not wants_traceback() and sys.stderr is not None:
            stack.enter_context(contextlib.redirect_stderr(_WithoutTracebacks(sys.stderr)))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        if not any(os.environ.get(name) for name in _LOUD):
            stack.callback(logging.disable, logging.root.manager.disable)
            logging.disable(logging.CRITICAL)
            if not sys.warnoptions:
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
        yield


class _WithoutTracebacks:
    """A stream without the traceback that a `GraphModule` prints before it raises the error. The error is shown anyway."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._dropped = False

    def write(self, text: str) -> int:
        ends_dropped, self._dropped = self._dropped and text == "\n", "Call using an FX-traced Module" in text
        return len(text) if ends_dropped or self._dropped else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
