"""What a single node does besides computing its value: the operands that it writes, the modes that it switches.

What is not known to be pure counts as a write. These are known: ops, by their schema; torch's public functions and Tensor
methods, by PyTorch's naming rule (a trailing underscore, `out=`, `inplace=`); untouched modules of torch.nn. A few of
them keep running statistics and do not declare it; they are listed here. Everything else, such as numpy code that
Dynamo wraps, a function kept by `torch.fx.wrap` or a user's own leaf module, may write its arguments and any other
memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch.fx import Node

from fusionpass.graph.identity import inner_name, is_packet_of_aten, is_public, name_of, torch_name
from fusionpass.graph.leaf_modules import is_pure
from fusionpass.graph.tensors import value_of
from fusionpass.private import HigherOrderOperator, OpOverload, OpOverloadPacket

_INPLACE_OPERATORS = frozenset(
    "iadd isub imul imatmul itruediv ifloordiv imod ipow ilshift irshift iand ior ixor iconcat setitem delitem".split()
)
# They update the running statistics in their arguments, and no schema says so. Each has an argument that switches this off.
_KEEP_STATISTICS = {
    "batch_norm": "training",
    "_batch_norm_impl_index": "training",
    "native_batch_norm": "training",
    "_native_batch_norm_legit": "training",
    "cudnn_batch_norm": "training",
    "miopen_batch_norm": "training",
    "instance_norm": "use_input_stats",
}
# The same without such an argument, and ops that renormalise a weight.
_STATEFUL = frozenset(
    "_batch_norm_with_update batch_norm_gather_stats batch_norm_gather_stats_with_counts batch_norm_update_stats "
    "_cudnn_rnn_flatten_weight embedding_renorm_ _no_grad_embedding_renorm_ fused_moving_avg_obs_fake_quant "
    "sync_batch_norm".split()
)
_RENORMALISING = frozenset("embedding embedding_bag".split())  # under max_norm
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


def metadata_write(node: Node) -> bool:
    """Whether the node changes the shape or strides of its first operand in place."""
    return torch_name(node) in METADATA_WRITES


def level_change(node: Node) -> int:
    """1 where the node opens a vmap, grad or jvp level of torch.func, -1 where it closes one, else 0."""
    name = inner_name(node.target) if node.op == "call_function" else ""
    return name.endswith("_increment_nesting") - name.endswith("_decrement_nesting")


def is_functorch(node: Node) -> bool:
    """Whether the node opens or closes a level of torch.func, or takes a value into or out of one."""
    return node.op == "call_function" and inner_name(node.target).endswith(_FUNCTORCH_LEVELS)


def changes_state(node: Node) -> bool:
    """Whether the node switches the grad mode, the autocast mode, the functorch level or the stream for later nodes."""
    return node.op == "call_function" and _changes_state(node.target)


def _changes_state(target: Any) -> bool:
    if isinstance(target, OpOverload) and target.namespace == "streams":
        return True
    name = inner_name(target)
    return bool(name) and (
        name in _STATE_CHANGES
        or name.startswith(("_enter_", "_exit_", "_push_", "_pop_"))
        or name.endswith(_FUNCTORCH_LEVELS)
        or "stream" in name
        or name in ("record_event", "wait_event")
    )


def purely_computes(node: Node) -> bool:
    """Whether the node calls a function of torch that changes no state and writes nothing, for any arguments. Most nodes of
    a graph are such, and no more questions are asked about them."""
    return node.op == "call_function" and _purely_computes(node.target) and "out" not in node.kwargs


@lru_cache(maxsize=4096)
def _purely_computes(target: Any) -> bool:
    if isinstance(target, OpOverload):
        if target.namespace not in ("aten", "prims") or target._schema.is_mutable:
            return False
        name = target.overloadpacket.__name__
    else:
        name = name_of(target)
        if not (is_packet_of_aten(target) or is_public(target)) or "inplace" in (_parameters(target) or ()):
            return False
    return (
        bool(name)
        and not name.endswith("_")
        and name.strip("_") not in _INPLACE_OPERATORS
        and name not in _STATEFUL | _RENORMALISING | _KEEP_STATISTICS.keys()
        and not _changes_state(target)
    )


def written_by(node: Node, modules: Mapping[str, torch.nn.Module]) -> tuple[Sequence[Node], bool]:
    """The operands whose memory the node writes, and whether it may also write memory that it was not given."""
    target = node.target
    if node.op == "call_module":
        return ((), False) if is_pure(modules.get(str(target))) else (node.all_input_nodes, True)
    if node.op == "call_method":
        if torch_name(node):
            return _written_by_method(node), False
        return ((), False) if _is_of_a_number(node) else (node.all_input_nodes, True)
    if isinstance(target, OpOverload):
        return _schema_writes(target, node), False
    if isinstance(target, HigherOrderOperator):
        return node.all_input_nodes, False
    if isinstance(target, OpOverloadPacket) and not is_packet_of_aten(target):
        mutable = any(getattr(target, name)._schema.is_mutable for name in target.overloads())
        return (node.all_input_nodes if mutable else ()), False
    if changes_state(node):
        return (), False
    if is_packet_of_aten(target) or is_public(target) or _is_of_einops(target):
        return _written_by_function(node), False
    # Torch's inner functions, such as `torch.cuda.get_device_capability`, follow no naming rule. They may write all their
    # arguments, but they know no other tensors.
    return node.all_input_nodes, not name_of(target)


def _is_of_a_number(node: Node) -> bool:
    """Whether it is a method of a value that cannot be written: a size, a number, a dtype."""
    receiver = value_of(node.args[0]) if node.args and isinstance(node.args[0], Node) else None
    return isinstance(receiver, (int, float, str, tuple, torch.SymInt, torch.SymFloat, torch.dtype, torch.device))


def _written_by_method(node: Node) -> Sequence[Node]:
    name = str(node.target)
    written = list(nodes_in(node.kwargs.get("out")))
    in_place = name.startswith("__i") and name.strip("_") in _INPLACE_OPERATORS
    if _names_a_write(name) or in_place or name == "__setitem__":
        written += nodes_in(node.args[:1])
    return written


def _written_by_function(node: Node) -> Sequence[Node]:
    name = name_of(node.target)
    written = list(nodes_in(node.kwargs.get("out")))
    if name.strip("_") in _INPLACE_OPERATORS:  # Python's own, and `torch.Tensor.__iadd__`
        return [*written, *nodes_in(node.args[:1])]
    if _keeps_statistics(node, name) or (_names_a_write(name) and name.startswith("_")):  # _foreach_add_, _fused_adam_
        return node.all_input_nodes
    if _names_a_write(name) or _argument(node.target, node, "inplace"):
        written += nodes_in(node.args[:1] or tuple(node.kwargs.values())[:1])
    return written


def _keeps_statistics(node: Node, name: str) -> bool:
    """Whether torch's function or op of this name updates its arguments, though neither name nor schema says so."""
    if name in _KEEP_STATISTICS:
        return _argument(node.target, node, _KEEP_STATISTICS[name]) is not False
    return name in _STATEFUL or (name in _RENORMALISING and _argument(node.target, node, "max_norm") is not None)


def _is_of_einops(target: Any) -> bool:
    return (getattr(target, "__module__", None) or "").partition(".")[0] == "einops"


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
    # The names of c10d's collectives say it, such as `allreduce_`, but their schemas do not.
    undeclared = not target._schema.is_mutable and _names_a_write(target.overloadpacket.__name__)
    if undeclared or (target.namespace == "aten" and _keeps_statistics(node, target.overloadpacket.__name__)):
        return node.all_input_nodes
    written: list[Node] = []
    for index, name in _written_arguments(target):
        written += nodes_in(node.args[index] if index < len(node.args) else node.kwargs.get(name))
    return written


@cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...] | None:
    """The names of a call's parameters, in order; None if they cannot be found out."""
    if isinstance(function, OpOverload):
        return tuple(argument.name for argument in function._schema.arguments)
    if isinstance(function, OpOverloadPacket):
        return None
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin: torch's write in place only by name or `out=`
        return None


def _argument(function: Any, node: Node, name: str) -> Any:
    """The value that the call gives to the parameter `name`, None if it gives none."""
    if name in node.kwargs:
        return node.kwargs[name]
    parameters = _parameters(function)
    if parameters is None or name not in parameters:
        return None
    index = parameters.index(name)
    return node.args[index] if index < len(node.args) else None
