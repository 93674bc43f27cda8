"""What a target on the command line resolves to, and the one-sentence error if it does not resolve."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.export import ExportedProgram


_EXPLANATION = re.compile(r"^\s*Explanation: (.+)$", re.MULTILINE)
_PREAMBLE = re.compile(r"^Dynamo failed to run FX node with fake tensors: .*: got (?=\w+\()")
_BACKEND = re.compile(r"^backend=.* raised: ")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_TOO_MUCH = re.compile(r"you tried to allocate (\d+) bytes")
_QUOTED = re.compile(r"""\w+\((['"])(.*)\1\)""")  # the repr of an exception
_TORCH = os.path.dirname(torch.__file__)


class TargetError(ValueError):
    """The target cannot be used. The message repeats the input and says the next step, in one line."""


@dataclass
class Target:
    """A callable with the inputs of one call, or an exported program.

    Attributes:
        name: the user's words for it.
        model: an `nn.Module` or function; None for an exported program.
        args: positional inputs of the call.
        kwargs: keyword inputs of the call.
        program: the exported program of a `.pt2` archive, else None.
        notes: what the user should know about how it was built, one sentence each.
        advice: what to try first if the capture fails; "" for nothing.
    """

    name: str
    model: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    program: ExportedProgram | None = None
    notes: tuple[str, ...] = ()
    advice: str = ""

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """The settings while the target is captured: no gradients, and on meta a size for `nonzero`.

        A meta tensor has no values to count. So `nonzero` raises on it, unless torch may assume that all are nonzero.
        """
        from torch.fx.experimental import _config

        with torch.no_grad(), _config.patch(meta_nonzero_assume_all_nonzero=True):
            yield

    @property
    def on_meta(self) -> bool:
        return any(value.is_meta for value in (*self.args, *self.kwargs.values()) if isinstance(value, torch.Tensor))


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of an error's text that says something, cut to `most` characters. If it ends with a colon, the
    next lines are added."""
    asked = asked_for(error)
    if asked:
        return asked
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    last = next((at for at, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    return _cut(" ".join(lines[: last + 1]).rstrip(":"), most)


def asked_for(error: BaseException) -> str:
    """An error about too little memory in plain words; "" for any other error."""
    found = _TOO_MUCH.search(str(error))
    if found is not None:
        return f"there is no memory for a tensor of {int(found[1]) / 1e9:,.0f} GB"
    return "the GPU has too little memory" if isinstance(error, torch.OutOfMemoryError) else ""


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def one_line(error: BaseException, most: int = 320) -> str:
    """Type, first line and place of an error of the capture, in one line.

    The first line of Dynamo's own errors is a title. Their explanation says what happened. The end of the user's frames says
    where.
    """
    text = str(error)
    explained = _EXPLANATION.search(text)
    what = _BACKEND.sub("the inner compiler failed: ", first_line(error, most + 300))
    what = _cut(what, most)
    if explained is not None and not asked_for(error):
        inner = _PREAMBLE.sub("", explained[1])
        quoted = _QUOTED.fullmatch(inner)
        what = _cut(inner if quoted is None else quoted[2], most)
    frames = _FRAME.findall(text.partition("from user code:")[2])
    frames = [frame for frame in frames if not frame[0].startswith(_TORCH)] or frames
    where = f" at {os.path.basename(frames[-1][0])}:{frames[-1][1]}" if frames else ""
    return f"{type(error).__name__}{where}: {what.rstrip('.!')}"


def ensure_device(device: str) -> torch.device:
    """`device` as torch's type, if this machine has the device."""
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise TargetError(f"device {device!r} is unknown to torch: use cpu, cuda or meta") from error
    if chosen.type not in ("cpu", "cuda", "meta"):
        _ensure_linked(device, chosen)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise TargetError(f"device {device!r} was asked for, and torch sees no CUDA GPU: use --device meta or cpu")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise TargetError(
            f"device {device!r} was asked for, and torch sees {count} GPUs, numbered from 0: name another"
        )
    return chosen


def _ensure_linked(device: str, chosen: torch.device) -> None:
    """Make sure that a tensor can be made there. torch knows the names of more devices than it is built for."""
    try:
        torch.empty(0, device=chosen)
    except Exception as error:  # each missing device raises another type
        why = first_line(error, 160).partition(". ")[0]
        raise TargetError(
            f"device {device!r} was asked for, and torch makes no tensor there ({why}): use --device meta or cpu"
        ) from error
