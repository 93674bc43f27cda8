"""Which torch operation is this? Only this module looks at the names of what is called.

A name counts only if it is torch's own: overloads of `aten` and `prims`, torch's functions, Python's operators, Tensor
methods. A user's op `mylib::half`, a function `flatten` kept by `torch.fx.wrap`, or a method of an object that is no tensor
may have the same name and do anything.
"""

from __future__ import annotations

import builtins
import math
import operator
import os
import sys
import types
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from fusionpass.graph.tensors import value_of
from fusionpass.private import OpOverload, OpOverloadPacket

_TORCH = os.path.dirname(torch.__file__) + os.sep
_COMPILED = (types.MethodDescriptorType, types.WrapperDescriptorType, types.BuiltinFunctionType)
_NAMESPACES = ("aten", "prims", "prim")
# Where torch's compiled functions are found. A Python function is looked up in the module that its `__module__` names.
_OWNERS = (
    torch,
    F,
    torch.Tensor,
    torch._C._nn,
    torch.special,
    torch.linalg,
    torch.fft,
    torch._C._special,
    torch._C._linalg,
    torch._C._fft,
    operator,
    math,
    builtins,
)
_HOMES = ("torch", "_operator", "operator", "math", "builtins")


def torch_name(node: Node) -> str:
    """The bare name of the torch operation a node calls, "" when it calls something else.

    It is "view" for the method, the function and `aten.view.default` alike.
    """
    if node.op == "call_function":
        return name_of(node.target)
    if node.op != "call_method":
        return ""
    # A receiver without a recorded value may be no tensor but an object of the user's.
    receiver = value_of(node.args[0]) if node.args and isinstance(node.args[0], Node) else None
    name = str(node.target)
    return name if isinstance(receiver, torch.Tensor) and _tensor_has(name) else ""


def _tensor_has(name: str) -> bool:
    """Whether Tensor's method of this name is torch's own. Asked each time, since people add methods and patch them."""
    method = getattr(torch.Tensor, name, None)
    return isinstance(method, _COMPILED) or written_in_torch(method)


def written_in_torch(function: Any) -> bool:
    """Told by the file of its code. A patch made with `functools.wraps` has torch's name and module, but not its file."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.startswith(_TORCH)


@lru_cache(maxsize=4096)
def name_of(target: Any) -> str:
    """`torch_name` of the target of a `call_function` node."""
    if isinstance(target, OpOverload):
        return target.overloadpacket.__name__ if target.namespace in _NAMESPACES else ""
    if isinstance(target, OpOverloadPacket):
        return target.__name__ if target.__module__.rpartition(".")[2] in _NAMESPACES else ""
    name = getattr(target, "__name__", "")
    return name if name and _is_its_own(target, name) else ""


def _is_its_own(target: Any, name: str) -> bool:
    """Whether torch or Python has this very object under its name. A wrapper or patch with that name is another object."""
    home = getattr(target, "__module__", None)
    if home is not None and home.partition(".")[0] not in _HOMES:
        return False
    owners = _OWNERS if home is None or home not in sys.modules else (sys.modules[home], *_OWNERS)
    return any(getattr(owner, name, None) is target for owner in owners)


@lru_cache(maxsize=4096)
def is_public(target: Any) -> bool:
    """Whether a function is from torch's public namespaces. Such functions write only what their names, `out=` and
    `inplace=` say. Functions of torch's inner modules follow no such rule."""
    name = name_of(target)
    return bool(name) and any(getattr(owner, name, None) is target for owner in (*_OWNERS, torch.functional))


@lru_cache(maxsize=4096)
def is_packet_of_aten(target: Any) -> bool:
    """Whether this is an op called by hand without its overload, such as `torch.ops.aten.sigmoid`."""
    return isinstance(target, OpOverloadPacket) and name_of(target) != ""


@lru_cache(maxsize=4096)
def method_name(target: Any) -> str:
    """The Tensor method that a function stands for: `torch.ops.aten.add` without its overload, or `torch.Tensor.add`."""
    name = name_of(target)
    is_method = is_packet_of_aten(target) or (bool(name) and getattr(torch.Tensor, name, None) is target)
    return name if is_method else ""


@lru_cache(maxsize=4096)
def inner_name(target: Any) -> str:
    """The name of a function of torch's inner modules as well, such as those that switch modes; "" for anything else."""
    if isinstance(target, OpOverload | OpOverloadPacket):
        return name_of(target)
    home = getattr(target, "__module__", None) or ""
    return getattr(target, "__name__", "") if home.partition(".")[0] == "torch" else ""
