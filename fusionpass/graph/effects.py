"""Which node writes which memory, and one question: may a value be read here instead of there?

Memory is identified by the storage of the tracer's fake tensors: views, in-place results, `.to(same dtype)` and
parameters that share memory have one storage. `make_fx` in "real" mode records a storage per node, so the alias
annotations of aten schemas are followed as well.

Inputs and attributes bring memory from outside. In a later call they may share memory, even if they did not in the traced
one: Dynamo guards on equal tensors, not on overlapping ones. So a write to one of them may hit all of them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Collection, Sequence
from functools import cache

import torch
from torch.fx import GraphModule, Node

from fusionpass.graph.identity import torch_name
from fusionpass.graph.tensors import attribute, known_equal, storage_keys, tensor_of, value_of
from fusionpass.graph.writes import (
    changes_state,
    is_functorch,
    level_change,
    metadata_write,
    purely_computes,
    written_by,
)
from fusionpass.private import OpOverload


class Effects:
    """The writes and mode changes of one graph, by position, as they stood before the first rewrite.

    Rewriting keeps it valid: a new node takes the position of the add it replaces and writes nothing.
    """

    def __init__(self, graph_module: GraphModule, inside_functorch: bool = False):
        self._owner = graph_module
        self._storages: dict[Node, frozenset[int]] = {}
        self._stands_for: dict[Node, Node] = {}  # a replacement -> the add that it replaced
        self._groups: dict[int, list[Node]] | None = None
        self._nodes = list(graph_module.graph.nodes)
        self.position = {node: index for index, node in enumerate(self._nodes)}
        self._writes: dict[int, list[int]] = defaultdict(list)  # storage -> positions, ascending
        self._all_writes: list[int] = []
        self._barriers: list[int] = []  # positions of writes to unknown memory
        self._outside_writes: list[int] = []  # positions of writes to memory from outside
        self._outside: frozenset[int] | None = None
        self._states: list[int] = []
        self._levels: list[tuple[int, int]] = []  # positions where levels of torch.func open (1) and close (-1)
        self._reshaped: dict[int, Node] = {}  # storage -> the node that changed a tensor's shape or strides in place
        self._inside_functorch = inside_functorch  # a graph around this one has opened a level
        calls_modules = any(node.op == "call_module" for node in self._nodes)
        modules = dict(graph_module.named_modules()) if calls_modules else {}
        for index, node in enumerate(self._nodes):
            if node.op not in ("call_function", "call_method", "call_module") or purely_computes(node):
                continue
            if changes_state(node):
                self._states.append(index)
                if is_functorch(node):
                    self._levels.append((index, level_change(node)))
            self._record_writes(index, node, modules)

    def _record_writes(self, index: int, node: Node, modules: dict[str, torch.nn.Module]) -> None:
        written, unknown = written_by(node, modules)
        if unknown:
            self._barriers.append(index)
        if written or unknown:
            self._all_writes.append(index)
        for operand in written:
            storages = self.storages(operand)
            if not storages and unknown is False and _may_hold_tensor(operand):
                self._barriers.append(index)
            if not self._outside_storages().isdisjoint(storages):
                self._outside_writes.append(index)
            for storage in storages:
                self._writes[storage].append(index)
                if metadata_write(node):
                    self._reshaped.setdefault(storage, node)

    def _outside_storages(self) -> frozenset[int]:
        """The memory of inputs and attributes. Looked up only if something is written."""
        if self._outside is None:
            given = [node for node in self._nodes if node.op in ("placeholder", "get_attr")]
            self._outside = frozenset(key for node in given for key in self.storages(node))
        return self._outside

    @property
    def has_levels(self) -> bool:
        """Whether the graph, or a graph around it, opens levels of torch.func."""
        return self._inside_functorch or bool(self._levels)

    def inside_functorch(self, first: Node, last: Node) -> bool:
        """Whether a level of torch.func is open at the two nodes, or opens or closes between them."""
        start, end = self.position[first], self.position[last]
        depth = sum(change for index, change in self._levels if index < start)
        return self._inside_functorch or depth != 0 or any(start <= index <= end for index, _ in self._levels)

    def storages(self, node: Node) -> frozenset[int]:
        """Identities of the memory in which the node's value lies; empty if it has no tensor or none was recorded."""
        chain = []
        node = self._stands_for.get(node, node)
        while node not in self._storages:
            chain.append(node)
            source = _aliased_operand(node)
            if source is None:
                inputs = node.all_input_nodes if may_be_its_input(node) else ()
                self._storages[node] = self._own_storages(node).union(*map(self.storages, inputs))
                break
            node = self._stands_for.get(source, source)
        keys = self._storages[node]
        for alias in reversed(chain):
            keys = self._storages[alias] = keys | self._own_storages(alias)
        return keys

    def _own_storages(self, node: Node) -> frozenset[int]:
        value = value_of(node)
        if value is None and node.op == "get_attr":  # make_fx records no value for a tensor that a function closes over
            value = attribute(self._owner, str(node.target))
        tensors = value if isinstance(value, (list, tuple)) else (value,)
        return frozenset(key for t in tensors if isinstance(t, torch.Tensor) for key in storage_keys(t))

    def write_between(self, operand: Node | str, read: Node, now: Node, but: Collection[Node] = ()) -> Node | None:
        """The first node after `read` and before `now`, except those in `but`, that may write the operand's memory, or None.

        If the operand is the path of a parameter, for which the graph has no node, any write may be one to it.
        """
        start, end = self.position[read], self.position[now]
        if isinstance(operand, str):
            position = _first_between(self._all_writes, start, end)
            return None if position is None else self._nodes[position]
        if _first_between(self._all_writes, start, end) is None:
            return None
        storages = self.storages(operand)
        suspects = [self._writes.get(key, ()) for key in storages]
        suspects.append(self._barriers)
        if not self._outside_storages().isdisjoint(storages):
            suspects.append(self._outside_writes)
        mine = {self.position[node] for node in but}
        found = [p for positions in suspects if (p := _first_between(positions, start, end, mine)) is not None]
        return self._nodes[min(found)] if found else None

    def writes(self, node: Node) -> bool:
        """Whether the node may write anything."""
        index = bisect_left(self._all_writes, self.position[node])
        return index < len(self._all_writes) and self._all_writes[index] == self.position[node]

    def state_change_between(self, first: Node, last: Node) -> Node | None:
        """The first node between the two that switches grad mode, autocast, a functorch level or the stream."""
        position = _first_between(self._states, self.position[first], self.position[last])
        return None if position is None else self._nodes[position]

    def reshaped_by(self, operand: Node | str) -> Node | None:
        """A node that changes the shape or strides of the operand's memory in place: then the recorded values are wrong."""
        if not self._reshaped or isinstance(operand, str):
            return None
        for key in self.storages(operand):
            if key in self._reshaped:
                return self._reshaped[key]
        return None

    def other_reader(self, operand: Node, writer: Node) -> Node | None:
        """What would notice that `writer` no longer writes the operand's memory: an owner outside the graph, or a later
        reader of an older name of it. None if the memory is the graph's own and only `writer`'s result is still read."""
        now = self.position[writer]
        for key in self.storages(operand):
            for node in self._group(key):
                if node.op in ("placeholder", "get_attr"):
                    return node
                if self.position.get(node, now) >= now:
                    continue
                for user in node.users:
                    if self.position.get(user, now) > now:
                        return user
        return None

    def adopt(self, new: Node, old: Node) -> None:
        """Give `new` the position and the memory of `old`: readers of views of the old sum now read views of the new one."""
        index = self.position[new] = self.position[old]
        self._nodes[index] = new
        self._stands_for[new] = old
        if self._groups is not None:
            for key in self.storages(new):
                self._groups[key].append(new)

    def _group(self, key: int) -> list[Node]:
        if self._groups is None:
            self._groups = defaultdict(list)
            for node in self._nodes:
                for storage in self.storages(node):
                    self._groups[storage].append(node)
        return self._groups[key]


# Composite functions that return their input itself if they have nothing to do. No schema says so, and for some of them the
# fake result is a fresh tensor.
_MAY_BE_ITS_INPUT = frozenset(
    "dropout dropout_ feature_dropout alpha_dropout feature_alpha_dropout dropout1d dropout2d dropout3d einsum type_as "
    "atleast_1d atleast_2d atleast_3d broadcast_tensors meshgrid to_dense positive".split()
)


def may_be_its_input(node: Node) -> bool:
    """Whether the result may be one of the operands itself, or a view of it, though nothing says so."""
    return torch_name(node) in _MAY_BE_ITS_INPUT


def fills_its_memory(node: Node) -> bool:
    """Whether the node's tensor is known to fill its whole storage.

    If each node was recorded with a storage of its own, the value that the node is a view of is asked too.
    """
    tensor = tensor_of(node)
    size = tensor.numel() * tensor.element_size()
    if not (known_equal(tensor.storage_offset(), 0) and known_equal(tensor.untyped_storage().nbytes(), size)):
        return False
    source = _aliased_operand(node)
    whole = tensor_of(source)
    return source is None or (
        whole is not None and known_equal(whole.numel(), tensor.numel()) and fills_its_memory(source)
    )


def _first_between(positions: Sequence[int], start: int, end: int, but: Collection[int] = ()) -> int | None:
    index = bisect_right(positions, start)
    while index < len(positions) and positions[index] in but:
        index += 1
    return positions[index] if index < len(positions) and positions[index] < end else None


def _may_hold_tensor(node: Node) -> bool:
    value = value_of(node)
    return value is None or isinstance(value, (torch.Tensor, list, tuple, dict))


def _aliased_operand(node: Node) -> Node | None:
    """The first operand whose memory the node's result shares by its schema, or whose element it takes."""
    target = node.target
    if isinstance(target, OpOverload):
        found = _aliased_argument(target)
        if found is not None:
            index, name = found
            source = node.args[index] if index < len(node.args) else node.kwargs.get(name)
            return source if isinstance(source, Node) else None
    if torch_name(node) == "getitem" and node.args and isinstance(node.args[0], Node):
        return node.args[0]
    return None


@cache
def _aliased_argument(target: OpOverload) -> tuple[int, str] | None:
    schema = target._schema
    if all(result.alias_info is None for result in schema.returns):
        return None
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None:
            return index, argument.name
    return None
