"""What a target on the command line resolves to, and the one-sentence error when it does not."""

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
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


class TargetError(ValueError):
    """The target cannot be used; the message restates the input and says the next step, in one line."""


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
    """

    name: str
    model: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    program: ExportedProgram | None = None
    notes: tuple[str, ...] = ()

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """What has to hold while the target is captured: no gradients, and on meta a size for `nonzero`.

        A meta tensor has no values to count, so `nonzero` on it raises unless torch may assume that all are nonzero.
        """
        from torch.fx.experimental import _config

        with torch.no_grad(), _config.patch(meta_nonzero_assume_all_nonzero=True):
            yield

    @property
    def on_meta(self) -> bool:
        return any(value.is_meta for value in (*self.args, *self.kwargs.values()) if isinstance(value, torch.Tensor))


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of an error's text that says something, cut to `most` characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _cut(lines[0] if lines else "no message", most)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def one_line(error: BaseException, most: int = 320) -> str:
    """Type, first line and place of an error of the capture, in one line.

    Dynamo's own errors have a title as their first line; what happened is in their explanation, and where it happened
    at the end of the user's frames.
    """
    text = str(error)
    explained = _EXPLANATION.search(text)
    what = first_line(error, most) if explained is None else _cut(_PREAMBLE.sub("", explained[1]), most)
    frames = _FRAME.findall(text.partition("from user code:")[2])
    where = f" at {os.path.basename(frames[-1][0])}:{frames[-1][1]}" if frames else ""
    return f"{type(error).__name__}{where}: {what}"


def ensure_device(device: str) -> torch.device:
    """`device` as torch's, once a machine has it."""
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise TargetError(f"device {device!r} is unknown to torch: use cpu, cuda or meta") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise TargetError(f"device {device!r} was asked for, and torch sees no CUDA GPU: use --device meta or cpu")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise TargetError(
            f"device {device!r} was asked for, and torch sees {count} GPUs, numbered from 0: name another"
        )
    return chosen
