"""One run of a graph on fake tensors, in which each node keeps a record of its value.

Nothing of the user's is touched. Parameters, buffers and leaf modules are fake copies. So only the copy changes when a leaf
module's code writes, counts or caches something, or when its hooks do. The random streams are put back. The graphs that a
graph calls as modules, such as the pieces of a split one, are run node by node too.
"""

from __future__ import annotations

import copy
import logging
import operator
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves, tree_map

from fusionpass.graph.copying import replaces_forward
from fusionpass.graph.leaf_modules import has_hooks
from fusionpass.graph.tensors import storage_key, value_of
from fusionpass.private import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

log = logging.getLogger(__name__)


class _NotCopied(Exception):
    """A leaf module that Python cannot copy."""


# What fakes cannot follow. Then nothing is known of the node's value, nor of what is computed from it.
_NOT_FOLLOWED = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    _NotCopied,
)
_UNKNOWN = object()


def propagate(graph_module: GraphModule, example_inputs: Sequence[Any]) -> None:
    """Record, in the graphs that lack values, what every node gives for these inputs.

    Raises:
        ValueError: the graph does not run on them.
    """
    modes = [value.fake_mode for value in tree_leaves(list(example_inputs)) if isinstance(value, FakeTensor)]
    mode = modes[0] if modes else FakeTensorMode(allow_non_fake_inputs=True)
    fakes = _Fakes(mode)
    try:
        with _random_streams_kept(), _no_traceback_logged(), mode:
            inputs = tree_map(fakes.of, list(example_inputs))
            fakes.storages.clear()  # what the module holds, from here on
            _Recorder(graph_module, fakes, {}, lacks_values(graph_module)).run(*inputs, enable_io_processing=False)
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"example_inputs do not fit the graph: {type(error).__name__}: {first_line}") from error


@contextmanager
def _no_traceback_logged() -> Iterator[None]:
    """If the inputs do not fit an op, torch also logs a traceback. Our error says the same, so the log is left out."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")

    def other(record: logging.LogRecord) -> bool:
        return record.exc_info is None

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def lacks_values(graph_module: GraphModule) -> bool:
    """Whether the graph has calls, and none of them has a recorded value."""
    calls = [node for node in graph_module.graph.nodes if node.op.startswith("call_")]
    return bool(calls) and all(value_of(node) is None for node in calls)


def called_graphs(graph_module: GraphModule) -> list[GraphModule]:
    """The graphs that this one calls as modules, if the call does nothing else than run their nodes."""
    targets = dict.fromkeys(str(node.target) for node in graph_module.graph.nodes if node.op == "call_module")
    return [module for module in map(graph_module.get_submodule, targets) if _is_graph(module)]


def _is_graph(module: Any) -> bool:
    return isinstance(module, GraphModule) and not replaces_forward(module) and not has_hooks(module)


class _Fakes:
    """Fake copies of tensors and modules. Each has one copy, so that what is shared or aliased stays so."""

    def __init__(self, mode: Any):
        self.mode = mode
        self._memo: dict[int, Any] = {}
        self._given: list[Any] = []  # kept, since the memo knows them by id
        self.storages: set[int | None] = set()

    def of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, torch.nn.Module):
            return self._module(value)
        return value

    def _tensor(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._memo:
            ours = isinstance(tensor, FakeTensor) and tensor.fake_mode is self.mode
            fake = tensor if ours else self.mode.from_tensor(tensor, static_shapes=True)
            self._memo[id(tensor)] = fake
            self._given.append(tensor)
            self.storages.add(storage_key(fake))
        return self._memo[id(tensor)]

    def _module(self, module: torch.nn.Module) -> torch.nn.Module:
        if id(module) in self._memo:
            return self._memo[id(module)]
        for tensor in (*module.parameters(), *module.buffers()):
            if not torch.nn.parameter.is_lazy(tensor):
                self._tensor(tensor)
        try:
            with FakeCopyMode(self.mode):
                new = copy.deepcopy(module, self._memo)
        except Exception as error:  # an object of the user's that cannot be copied may raise anything
            log.info("%s is not run for shapes: it cannot be copied (%s)", type(module).__name__, error)
            raise _NotCopied from error
        self._given.append(module)
        return new


class _Recorder(Interpreter):
    """Runs one graph, with fakes in place of what the module holds."""

    def __init__(self, module: GraphModule, fakes: _Fakes, seen: dict[int, Any], records: bool):
        super().__init__(module)
        self.extra_traceback = False
        self.fakes = fakes
        self.seen = seen  # id of a called graph -> what it was called on; None if its calls differ
        self.records = records
        self.recorded: set[int] = set()  # the graphs whose records are ours

    def run_node(self, n: Node) -> Any:
        if n.op != "output" and self._reads_unknown(n):
            return _UNKNOWN
        try:
            result = super().run_node(n)
        except _NOT_FOLLOWED as error:
            log.info("the value of %s is not known before it runs (%s)", n, type(error).__name__)
            return _UNKNOWN
        if self.records and n.op != "output" and result is not _UNKNOWN:
            value = tree_map(self._snapshot, result)
            if value is not None:
                n.meta["val"] = value
        return result

    def fetch_attr(self, target: str) -> Any:
        return self.fakes.of(super().fetch_attr(target))

    def call_module(self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        module = super().fetch_attr(target)
        if not _is_graph(module):
            return super().call_module(target, args, kwargs)
        return self._called(module, args, kwargs)

    def _called(self, graph_module: GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run a graph that this one calls. Its nodes have one record each, so every call must be on the same things."""
        inputs = _bound(graph_module, graph_module.graph.process_inputs(*args), kwargs)
        signature = self._signature(inputs)
        key, records = id(graph_module), False
        if key not in self.seen:
            self.seen[key] = signature
            records = lacks_values(graph_module)
            if records:
                self.recorded.add(key)
        elif self.seen[key] != signature:
            self.seen[key] = None
            if key in self.recorded:
                for node in graph_module.graph.nodes:
                    node.meta.pop("val", None)
        inner = _Recorder(graph_module, self.fakes, self.seen, records)
        inner.recorded = self.recorded
        return graph_module.graph.process_outputs(inner.run(*inputs, enable_io_processing=False))

    def _reads_unknown(self, n: Node) -> bool:
        values = [self.env[node] for node in n.all_input_nodes]
        if n.target is operator.getitem:  # other elements of the tuple may be known
            return any(value is _UNKNOWN for value in values)
        return any(leaf is _UNKNOWN for leaf in tree_leaves(values))

    def _snapshot(self, value: Any) -> Any:
        """The value as it is now: later nodes may change a tensor's shape in place."""
        if isinstance(value, Tensor):
            fake = value if isinstance(value, FakeTensor) else self.fakes.of(value)
            with torch.no_grad():
                return fake.detach().requires_grad_(fake.requires_grad)
        return value if isinstance(value, int | float | torch.SymInt | torch.SymFloat | torch.SymBool) else None

    def _signature(self, inputs: Sequence[Any]) -> tuple:
        """How two calls of a graph may differ: the kind of each input, and which inputs lie in the same memory."""
        places: dict[Any, Any] = {}
        parts = []
        for leaf in tree_leaves(list(inputs)):
            if not isinstance(leaf, Tensor):
                parts.append((type(leaf), leaf))
                continue
            key = storage_key(leaf)
            place = key if key in self.fakes.storages else places.setdefault(key, len(places))
            kind = leaf.dtype, leaf.device, leaf.requires_grad, leaf.storage_offset()
            parts.append((*kind, tuple(leaf.shape), tuple(leaf.stride()), place))
        return tuple(parts)


def _bound(graph_module: GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """One value per placeholder, in their order, for a call with these arguments."""
    inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    values = list(args)
    for node in inputs[len(values) :]:
        if node.target not in kwargs and not node.args:
            raise TypeError(f"{type(graph_module).__name__} is called without its input {node.target}")
        values.append(kwargs[node.target] if node.target in kwargs else node.args[0])
    return values


@contextmanager
def _random_streams_kept() -> Iterator[None]:
    """Put the user's random streams back: a leaf module's own code may draw from them."""
    numpy = sys.modules.get("numpy")
    python, arrays = random.getstate(), numpy.random.get_state() if numpy is not None else None
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(arrays)
