"""Where a node comes from: the user's source line and module path, and the metadata a replacement inherits."""

from __future__ import annotations

import os
import re
from typing import Any

from torch.fx import Node
from torch.fx.traceback import NodeSource, NodeSourceAction

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
# The captured module itself: under Dynamo, under Dynamo when it is one of torch's own modules, under export.
_ROOT = re.compile(r"^(?:L\['self'\]|L\['fn'\]|L__self__|self(?=\.|$))\.?")
_WRAPPED = re.compile(r"^[LG]\['(\w+)'\]")


def source_of(node: Node) -> str:
    """`file.py:line` of the innermost frame that the tracer recorded, "" if it recorded none."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    path, line = frames[-1]
    return f"{os.path.basename(path)}:{line}"


def module_of(node: Node) -> str:
    """Dotted path of the innermost module that the node was traced in, "" for the root or if none was recorded."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    path = _ROOT.sub("", str(path))
    path = _WRAPPED.sub(r"\1", path)
    return re.sub(r"\['?([^'\]]+)'?\]", r".\1", path.replace("._modules", "")).strip(".")


def inherit(old: Node, name: str) -> dict[str, Any]:
    """The metadata for a new node that computes `old`'s value in another way. It records `old` as the origin."""
    meta = dict(old.meta)
    meta["from_node"] = [NodeSource(old, "fusionpass", NodeSourceAction.REPLACE)]
    if "source_fn_stack" in meta:
        meta["source_fn_stack"] = [*meta["source_fn_stack"][:-1], (name, name)]
    meta.pop("original_aten", None)
    return meta
