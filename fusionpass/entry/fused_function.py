"""The function that `fuse` makes of another one, for all the ways in which it may be called."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fusionpass.entry.backend import Backend
from fusionpass.entry.instances import compiled
from fusionpass.entry.nothing_rewritten import Owned
from fusionpass.entry.outer_compile import Late, Target, comptime_hooks
from fusionpass.entry.recording import is_dynamo_compiling, recorder
from fusionpass.options import Options

# Keyed by the function object, not by an attribute: functools.wraps would copy an attribute to a wrapper that is not fused.
_ORIGINALS: weakref.WeakKeyDictionary[Callable[..., Any], Callable[..., Any]] = weakref.WeakKeyDictionary()
_OF_DYNAMO = ("_torchdynamo_inline", "_torchdynamo_orig_callable", "_torchdynamo_wrapper_id")


def original_of(function: Any) -> Any:
    """The function that a fused function was made of, bound if the fused one is bound. Anything else is its own original."""
    if isinstance(function, types.MethodType):
        original = original_of(function.__func__)
        return function if original is function.__func__ else types.MethodType(original, function.__self__)
    return _ORIGINALS.get(function, function) if isinstance(function, types.FunctionType) else function


def fused_function(function: Callable[..., Any], options: Options) -> Callable[..., Any]:
    """`function`, compiled with the pass.

    If somebody's Dynamo reads it, the graph is theirs, and is rewritten there (see `outer_compile`). Other tools record the
    function as it was given.
    """
    from fusionpass.private import comptime

    owned = Owned(compiled(function, Backend(options)), options)
    for_dynamo = _for_dynamo(function, options)
    target, enter, leave, pieces = for_dynamo.target, for_dynamo.enter, for_dynamo.leave, for_dynamo.pieces
    owned.for_dynamo = for_dynamo  # lives as long as the function does

    @functools.wraps(function)
    def fused(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            comptime(enter)
            return (pieces(*args, **kwargs), comptime(leave))[0]  # a local variable would name Dynamo's node
        who = recorder()
        if who is not None:
            target.aside(who)
            return function(*args, **kwargs)
        return owned(*args, **kwargs)

    for name in _OF_DYNAMO:  # copied from a function that was compiled already: they would lead past the wrapper
        fused.__dict__.pop(name, None)
    _ORIGINALS[fused] = function
    return fused


def rebindable(function: Callable[..., Any], options: Options) -> Callable[..., Any]:
    """`fused_function`, for an instance's forward.

    It hides the original function. Code that unwraps a method and binds it again would otherwise lose the fusion.
    """
    fused = fused_function(function, options)
    fused.__signature__ = inspect.signature(function)
    del fused.__wrapped__
    return fused


@dataclass(eq=False)
class _ForDynamo:
    """What somebody's Dynamo reads in a fused function, and guards by identity."""

    target: Target
    enter: Callable[[Any], None]
    leave: Callable[[Any], None]
    pieces: Callable[..., Any]  # Dynamo reads the function through it, and calls it if a graph breaks inside


_SHARED: weakref.WeakValueDictionary[tuple, _ForDynamo] = weakref.WeakValueDictionary()


def _for_dynamo(function: Callable[..., Any], options: Options) -> _ForDynamo:
    """One for all equal instances. Otherwise each would need a compilation of its own."""
    try:
        found = _SHARED.get((function, options))
    except TypeError:  # the option `inner`, or a forward set on an instance, cannot be hashed
        return _new_for_dynamo(function, options)
    if found is None:
        found = _SHARED[function, options] = _new_for_dynamo(function, options)
    return found


def _new_for_dynamo(function: Callable[..., Any], options: Options) -> _ForDynamo:
    target = Target(getattr(function, "__qualname__", None) or type(function).__qualname__, options)
    return _ForDynamo(target, *comptime_hooks(target), torch.compile(function, backend=Late(target)))
