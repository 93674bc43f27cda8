"""Resolve the TARGET of the command line: a Hugging Face model type, folder or hub id; Python code; a `.pt2` archive."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from fusionpass.targets.types import Target, TargetError

__all__ = ["Target", "TargetError", "resolve"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(
    target: str,
    *,
    layers: int | None = None,
    tokens: int | None = None,
    batch: int | None = None,
    experts: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    input_specs: Sequence[str] | None = None,
    trust_remote_code: bool = False,
) -> Target:
    """The model, function or exported program that `target` names, with inputs for one call.

    Args:
        target: a Hugging Face model type, a folder with a `config.json`, a hub id, `file.py:name`,
            `package.module:name` or the path of a `.pt2` archive.
        layers: decoder layers to keep of a Hugging Face config; None keeps all.
        tokens: length of each sequence of a Hugging Face model; None means 16.
        batch: sequences of a Hugging Face model; None means 1.
        experts: transformers' `experts_implementation`, such as "batched_mm"; None means the model's default.
        dtype: "bf16", "fp16" or "fp32"; None means bf16 for a Hugging Face model, and no cast for Python code.
        device: None means meta for a Hugging Face model. For Python code, None moves nothing.
        input_specs: `dtype[sizes]` of each input of Python code.
        trust_remote_code: run the model code that comes with a folder or hub repository.

    Raises:
        TargetError: one sentence that repeats the input and says the next step.
    """
    if dtype is not None and dtype not in DTYPES:
        raise TargetError(f"dtype is {dtype!r}: allowed are {', '.join(DTYPES)}")
    for name, value in (("layers", layers), ("tokens", tokens), ("batch", batch)):
        if value is not None and value < 1:
            raise TargetError(f"{name} is {value}: it takes a whole number from 1 up")
    hugging_face = {"--layers": layers, "--tokens": tokens, "--batch": batch, "--experts": experts}
    kind = _kind(target)
    if kind == "archive":
        refused = {**hugging_face, "--dtype": dtype, "--device": device, "--input": input_specs or None}
        _refuse(target, "an exported program, which brings its own", refused)
        from fusionpass.targets.archive import from_archive

        return from_archive(target)
    if kind == "python":
        _refuse(target, "Python code, whose sizes come from its inputs", hugging_face)
        from fusionpass.targets.python import from_python

        return from_python(target, input_specs=input_specs or (), device=device, dtype=DTYPES.get(dtype or ""))
    _refuse(target, "a Hugging Face model, whose inputs --batch and --tokens size", {"--input": input_specs or None})
    from fusionpass.targets.hugging_face import from_hugging_face

    return from_hugging_face(
        target,
        kind=kind,
        layers=layers,
        tokens=tokens or 16,
        batch=batch or 1,
        experts=experts,
        dtype=DTYPES[dtype or "bf16"],
        device=device or "meta",
        trust_remote_code=trust_remote_code,
    )


def _kind(target: str) -> str:
    """ "archive", "python", "folder", "hub" or "type", by the look of `target` and what is on disk."""
    if not target.strip():
        raise TargetError("the target is empty: name a model type such as qwen3_next, a FILE.py:NAME or a .pt2 archive")
    path = Path(target).expanduser()
    if target.endswith(".pt2"):
        return "archive"
    if ":" in target:
        return "python"
    if target.endswith(".py"):
        raise TargetError(f"{target!r} is a file without a name in it: write {target}:NAME")
    if path.is_dir():
        return "folder"
    if path.is_file():
        raise TargetError(
            f"{target!r} is a file of no known kind: give the folder of a config.json, a FILE.py:NAME or a .pt2 archive"
        )
    if target.startswith((".", "~", os.sep)) or target.endswith(os.sep) or target.count("/") > 1:
        raise TargetError(f"there is no file or folder {target!r}: check the path, it is looked up from {os.getcwd()}")
    return "hub" if _HUB_ID.fullmatch(target) else "type"


def _refuse(target: str, what: str, given: dict[str, object]) -> None:
    """Reject options that have no effect on this kind of target."""
    for option, value in given.items():
        if value is not None:
            raise TargetError(f"{option} has no effect on {target!r}, {what}: leave {option} out")
