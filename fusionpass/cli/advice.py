"""What to do when a target cannot be captured: the next step that fits the error and the command line."""

from __future__ import annotations

import argparse
import re

import torch

from fusionpass.targets.inputs import DTYPES
from fusionpass.targets.types import Target, asked_for

_OF_DTYPES = re.compile(r"\bdtypes?\b|scalar type|\b(BFloat16|Half|Float|Double|Long|Int|Bool)\b")
_NO_VALUES = re.compile(r"meta tensors?\b|\bmeta device\b|'Meta' backend", re.IGNORECASE)
_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}  # the values of --dtype


def given(target: Target, arguments: argparse.Namespace) -> str:
    """The target in the user's words, with the options given for its inputs."""
    dtype = [f"--dtype {arguments.dtype}"] if arguments.dtype else []
    inner = [] if arguments.inner == "eager" else [f"--inner {arguments.inner}"]
    specs = [*dtype, *(f'--input "{spec}"' for spec in arguments.input or ()), *inner]
    return f"{target.name!r} with {' '.join(specs)}" if specs else repr(target.name)


def advice(target: Target, arguments: argparse.Namespace, error: BaseException) -> str:
    """The next step, with a semicolon after it; "" if nothing is known to help."""
    text = f"{error} {error.__cause__}"
    if asked_for(error):
        return f"make {_sizes(arguments)} smaller, or use --device meta; "
    if target.advice:
        return f"{target.advice}; "
    if target.on_meta and _NO_VALUES.search(text):
        return "meta tensors have no values, so try --device cpu --layers 2; "
    if arguments.input and _OF_DTYPES.search(text):
        return _of_dtypes(target, arguments)
    return ""


def _sizes(arguments: argparse.Namespace) -> str:
    return "--input" if arguments.input else "--batch or --tokens"


def _of_dtypes(target: Target, arguments: argparse.Namespace) -> str:
    """The advice if the inputs have another dtype than the parameters of the module."""
    if not isinstance(target.model, torch.nn.Module):
        return ""
    dtypes = {parameter.dtype for parameter in target.model.parameters() if parameter.is_floating_point()}
    if len(dtypes) != 1:
        return ""
    (own,) = dtypes
    unlike = [spec for spec in arguments.input if DTYPES[spec.partition("[")[0].strip()] != own]
    if not unlike:
        return ""
    name = _SHORT.get(own, str(own).removeprefix("torch."))
    better = f'"{name}[{unlike[0].partition("[")[2]}"'
    theirs = DTYPES[unlike[0].partition("[")[0].strip()]
    cast = f" or give --dtype {_SHORT[theirs]}" if theirs in _SHORT else ""
    return f"the module's parameters are {str(own).removeprefix('torch.')}, so write --input {better}{cast}; "
