"""What a single node does besides compute its value: the operands it writes, the modes it switches.

Read off the schema where the target has one, and off PyTorch's naming rule (a trailing underscore, `out=`, `inplace=`) for
torch functions, Tensor methods and ops whose schema declares no write. A callable that is none of these, such as a function
kept by `torch.fx.wrap`, a leaf module of one's own or a higher-order op, is taken to write all it is given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch.fx import Node

from fusionpass.private import HigherOrderOperator, OpOverload, OpOverloadPacket

_INPLACE_OPERATORS = frozenset(
    "iadd isub imul imatmul itruediv ifloordiv imod ipow ilshift irshift iand ior ixor iconcat setitem delitem".split()
)
# They update running statistics, or renormalise a weight, that they are given.
_STATEFUL_FUNCTIONS = frozenset(
    "batch_norm instance_norm native_batch_norm cudnn_batch_norm embedding_bag embedding_renorm_ "
    "fused_moving_avg_obs_fake_quant sync_batch_norm".split()
)
METADATA_WRITES = frozenset(
    "t_ transpose_ swapaxes_ swapdims_ unsqueeze_ squeeze_ resize_ resize_as_ set_ as_strided_ rename_ "
    "detach_ requires_grad_ movedim_".split()
)
_STATE_CHANGES = frozenset(
    "_set_grad_enabled set_grad_enabled _set_deterministic_algorithms use_deterministic_algorithms "
    "_saved_tensors_hooks_enable _saved_tensors_hooks_disable _set_autocast _set_fwd_grad_enabled "
    "lazy_load_decompositions _wrap_for_grad _unwrap_for_grad _add_batch_dim _remove_batch_dim".split()
)
_FUNCTORCH_LEVELS = ("_increment_nesting", "_decrement_nesting", "wrap_for_grad", "_batch_dim")


def call_name(node: Node) -> str:
    """The bare name of what a node calls: "view" for the method, the function and `aten.view.default` alike."""
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, OpOverload):
        return target.overloadpacket.__name__
    return getattr(target, "__name__", "")


def is_functorch_level(node: Node) -> bool:
    """Whether the node opens or closes a vmap, grad or jvp level, or takes a value into or out of one."""
    return node.op == "call_function" and call_name(node).endswith(_FUNCTORCH_LEVELS)


def changes_state(node: Node) -> bool:
    """Whether later nodes run under another grad mode, autocast mode, functorch level or stream than earlier ones."""
    if node.op != "call_function":
        return False
    name = call_name(node)
    return (
        name in _STATE_CHANGES
        or name.startswith(("_enter_", "_exit_", "_push_", "_pop_"))
        or is_functorch_level(node)
        or "stream" in name
        or name in ("record_event", "wait_event")
    )


def written_by(node: Node, modules: Mapping[str, torch.nn.Module]) -> tuple[Sequence[Node], bool]:
    """The operands whose memory the node writes, and whether it may write memory it was not given."""
    target = node.target
    if node.op == "call_module":
        return (() if _is_pure_module(modules.get(str(target))) else node.all_input_nodes), False
    out = node.kwargs.get("out")
    written = list(nodes_in(out)) if out is not None else []
    if node.op == "call_method":
        name = str(target)
        if (
            _names_a_write(name)
            or (name.startswith("__i") and name.strip("_") in _INPLACE_OPERATORS)
            or name == "__setitem__"
        ):
            written += nodes_in(node.args[:1])
        return written, False
    if isinstance(target, OpOverload):
        return _schema_writes(target, node), False
    if isinstance(target, HigherOrderOperator):
        return node.all_input_nodes, False
    if isinstance(target, OpOverloadPacket):
        mutable = any(getattr(target, name)._schema.is_mutable for name in target.overloads())
        return (node.all_input_nodes if mutable else ()), False
    module = getattr(target, "__module__", None) or ""
    name = call_name(node)
    if module == "_operator":
        return (nodes_in(node.args[:1]) if name in _INPLACE_OPERATORS else written), False
    if module in ("math", "builtins") or module.split(".")[0] in ("torch", "einops"):
        if name in _STATEFUL_FUNCTIONS or (name == "embedding" and _argument(target, node, "max_norm") is not None):
            return node.all_input_nodes, False
        if _names_a_write(name) or _argument(target, node, "inplace"):
            written += nodes_in(node.args[:1] or tuple(node.kwargs.values())[:1])
        return written, False
    return node.all_input_nodes, True


def _names_a_write(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def nodes_in(value: Any) -> list[Node]:
    found: list[Node] = []
    torch.fx.map_arg(value, lambda node: found.append(node) or node)
    return found


@cache
def _written_arguments(target: OpOverload) -> tuple[tuple[int, str], ...]:
    arguments = enumerate(target._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _schema_writes(target: OpOverload, node: Node) -> list[Node]:
    if _names_a_write(call_name(node)) and not target._schema.is_mutable:
        return node.all_input_nodes  # c10d's collectives: `allreduce_` writes its tensors and does not declare it
    written: list[Node] = []
    for index, name in _written_arguments(target):
        written += nodes_in(node.args[index] if index < len(node.args) else node.kwargs.get(name))
    return written


def _is_pure_module(module: torch.nn.Module | None) -> bool:
    """A module of torch.nn that neither works in place, nor keeps statistics, nor has hooks."""
    if module is None or not type(module).__module__.startswith("torch.nn.modules"):
        return False
    if getattr(module, "inplace", False) or isinstance(module, torch.nn.modules.batchnorm._NormBase):
        return False
    return not has_hooks(module) and not any(module.children())


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether calling the module runs forward or backward hooks besides its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


@cache
def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # a builtin: torch's write in place only by name or `out=`
        return None


def _argument(function: Any, node: Node, name: str) -> Any:
    """The value the call gives to the parameter `name`, None when it gives none."""
    if name in node.kwargs:
        return node.kwargs[name]
    signature = _signature(function)
    if signature is None or name not in signature.parameters:
        return None
    index = list(signature.parameters).index(name)
    return node.args[index] if index < len(node.args) else None
