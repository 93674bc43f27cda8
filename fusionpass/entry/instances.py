"""Instances of one class share what Dynamo compiled of its forward. Past its recompile limit each is compiled by itself.

Dynamo counts recompiles per code object. Layers that differ by a guarded attribute, such as `layer_idx`, each need a
compilation. Past the limit (8) the remaining layers would run as they were written. From there on, if no compilation so far
fits an instance, it gets a copy of the code, and Dynamo counts the compilations of the copy from zero. Instances that
are equal to Dynamo still share one.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch

from fusionpass.entry.calls import local
from fusionpass.entry.no_graph import served
from fusionpass.private import _debug_get_cache_entry_list

log = logging.getLogger("fusionpass")


def compiled(function: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile(function, backend=backend)`, with Dynamo's recompile limit counted per instance where the first
    argument is a module."""
    from fusionpass.private import innermost_fn  # imports Dynamo, which `import fusionpass` alone does not need

    inner = innermost_fn(function)
    if inspect.iscoroutinefunction(inner) or inspect.isasyncgenfunction(inner) or inspect.isgeneratorfunction(inner):
        return inner  # torch 2.13's Dynamo refuses generators, and its code for a coroutine crashes Python
    if isinstance(inner, FunctionType):
        return PerInstance(inner, backend)
    return torch.compile(function, backend=backend)


class _Shared:
    """The state of one code object."""

    full = False  # whether Dynamo would refuse to compile it again
    said = False  # whether the log line about the cost was given


_shared: dict[int, _Shared] = {}  # by identity: a copy of a code object is equal to it


def _shared_of(code: CodeType) -> _Shared:
    found = _shared.get(id(code))
    if found is None:
        found = _shared[id(code)] = _Shared()
        weakref.finalize(code, _shared.pop, id(code), None).atexit = False
    return found


@dataclass
class _Instance:
    compiles: int = 0  # compilations of the shared code for this instance
    own: Callable[..., Any] | None = None


class PerInstance:
    """The compiled function."""

    def __init__(self, function: FunctionType, backend: Callable[..., Any]):
        self.function = function
        self.backend = backend
        self.compiled = torch.compile(function, backend=backend)
        self.instances: dict[int, _Instance] = {}
        self.shared = _shared_of(function.__code__)
        self._ask()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self._past_limit(args, kwargs) if self.shared.full else self.compiled
        here = local.state
        before = here.compiled
        result = run(*args, **kwargs)
        if here.compiled != before:
            self._compiled(args, run)
        return result

    def compiled_for(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        """What a call with these arguments would run now."""
        found = self.instances.get(id(args[0])) if args else None
        return found.own if found is not None and found.own is not None else self.compiled

    def _past_limit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        instance = self._instance(args)
        if instance is None:
            return self.compiled
        if instance.own is None and instance.compiles < torch._dynamo.config.recompile_limit:
            if served(self.function, self.backend, args, kwargs):
                return self.compiled
            instance.own = torch.compile(_copy(self.function), backend=self.backend)
            self._say()
        return instance.own or self.compiled

    def _compiled(self, args: tuple[Any, ...], run: Callable[..., Any]) -> None:
        instance = self._instance(args)
        if instance is not None and run is self.compiled:
            instance.compiles += 1
        self._ask()

    def _ask(self) -> None:
        """Find out whether the shared code is full. After `torch._dynamo.reset()` it no longer is."""
        times = len(_debug_get_cache_entry_list(self.function.__code__))
        self.shared.full = times >= torch._dynamo.config.recompile_limit
        if times == 0:
            self.shared.said = False
            self.instances.clear()

    def _instance(self, args: tuple[Any, ...]) -> _Instance | None:
        if not args or not isinstance(args[0], torch.nn.Module):
            return None
        key = id(args[0])
        if key not in self.instances:
            self.instances[key] = _Instance()
            weakref.finalize(args[0], self.instances.pop, key, None).atexit = False
        return self.instances[key]

    def _say(self) -> None:
        """Say once what it costs."""
        if not self.shared.said:
            self.shared.said = True
            log.warning(
                "%s was compiled %d times, which is Dynamo's limit for one function, since instances or calls differ: each "
                "further instance is compiled by itself, which takes time and memory; to compile once for all, fuse the "
                "module inside that holds the formula, such as the sparse block",
                self.function.__qualname__,
                torch._dynamo.config.recompile_limit,
            )


def _copy(function: FunctionType) -> FunctionType:
    """The same function with a code object of its own."""
    new = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    new.__kwdefaults__ = function.__kwdefaults__
    new.__dict__.update(function.__dict__)
    new.__qualname__, new.__module__ = function.__qualname__, function.__module__
    return new
