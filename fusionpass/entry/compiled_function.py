"""Which function was given to `torch.compile`? Asked while one of its graphs is compiled: Dynamo gives a backend only
the graph."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch.fx import GraphModule

_EVAL_FRAME = ("torch/_dynamo/eval_frame.py", "compile_wrapper")
_CONVERT_FRAME = ("torch/_dynamo/convert_frame.py", "_compile")
_BY_BUCKET = ("torch/_dynamo/backends/distributed.py", "compile_fn")  # DDPOptimizer splits one graph into several


@dataclass(frozen=True)
class Place:
    """Attributes:
    function: the outermost function given to torch.compile, by name, file and line; None where it is not known.
    piece: whether the graph is one of several that this function runs as.
    """

    function: Hashable
    piece: bool


def place_of(graph_module: GraphModule) -> Place:
    """The place of the graph that is compiled now on this thread.

    A graph is a piece in three cases. It ends at a graph break or starts after one. Or its function is called by the
    one that was given to torch.compile and is not traced into, as behind hooks such as FSDP2's. Or DDP splits it.
    """
    reason = getattr(graph_module, "compile_subgraph_reason", None)
    piece = reason is not None and bool(reason.graph_break)
    function = compiling = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _is(frame, _CONVERT_FRAME) and compiling is None:
            compiling = frame.f_locals.get("code")
        elif _is(frame, _BY_BUCKET):
            piece = True
        elif _is(frame, _EVAL_FRAME):
            function = frame.f_locals.get("fn")  # the last one found is the outermost
        frame = frame.f_back
    if function is None:
        return Place(None, piece)
    whole = compiling is None or compiling is _code_of(function)
    return Place(name_of(function), piece or not whole)


def _code_of(function: Any) -> Any:
    """The code that Dynamo compiles for the function. Dynamo reads through a module's call, so for a module:
    `forward`'s code."""
    module = getattr(function, "__self__", None)
    if isinstance(module, torch.nn.Module) and getattr(function, "__func__", None) in _CALLS:
        function = module.forward
    return getattr(function, "__code__", None)


_CALLS = (torch.nn.Module._wrapped_call_impl, torch.nn.Module._call_impl, torch.nn.Module.__call__)


def name_of(function: Any, args: Sequence[Any] = ()) -> Hashable:
    """A name for the function by its source. Equal layers that are compiled one by one have the same name; two
    `nn.Sequential` of different layers do not.

    args: the arguments of the call, if the function is a `forward` that takes its module first.
    """
    module = getattr(function, "__self__", getattr(function, "__wrapped__", args[0] if args else None))
    layers = tuple(type(m) for m in module.modules()) if isinstance(module, torch.nn.Module) else ()
    code = getattr(function, "__code__", None)
    return (
        (code.co_name, code.co_filename, code.co_firstlineno, layers) if code is not None else (type(function), layers)
    )


def _is(frame: FrameType, place: tuple[str, str]) -> bool:
    file, name = place
    return frame.f_code.co_name == name and frame.f_code.co_filename.replace("\\", "/").endswith(file)
