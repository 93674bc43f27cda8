"""`fuse`: the pass as a decorator, on a function, a `forward`, an `nn.Module` class or an instance."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fusionpass.backend import Backend
from fusionpass.instances import compiled
from fusionpass.notice import Owned
from fusionpass.options import Options
from fusionpass.private import _len_torch_dispatch_stack

Target = TypeVar("Target")


def fuse(target: Any = None, /, *, inner: str | Callable[..., Any] = "eager", **options: Any) -> Any:
    """Compile `target` with the pass in front of `inner`.

    Args:
        target: a function or `forward` (returns the fused function), an `nn.Module` class (its `forward` is replaced, for
            all instances; returns the class), or an `nn.Module` instance (its `forward` is replaced; returns the
            instance). Left out, `fuse(...)` returns the decorator.
        inner: what compiles the rewritten graph: "eager" runs it as it is; "aot_eager", "cudagraphs", "inductor", any
            registered backend's name, or a callable.
        options: `rules`, `numerics`, `profitable_only`, `strict`, `verify`, `mode`, `inductor`; see
            `fusionpass.options.Options`.

    A fused module keeps its class, its parameters' names, and stays fused through deepcopy and pickle. `del
    module.forward` takes the fusion off an instance again.

    Raises:
        TypeError: `target` is nothing that can be called.
        ValueError: an unknown option or value.
        NothingRewritten: on a call, under `strict`, when no rewritten site ran in it.
        VerificationFailed: on a call, under `verify`, when a site computed anything else than its nodes.

    Example:
        >>> @fusionpass.fuse
        ... def combine(a, x, w, b):
        ...     return a + torch.sigmoid(x @ w.T) * b
    """
    chosen = Options.from_user({"inner": inner, **options})
    if target is None:
        return lambda late: _fuse(late, chosen)
    return _fuse(target, chosen)


def _fuse(target: Any, options: Options) -> Any:
    if isinstance(target, torch.nn.Module):
        target.forward = FusedForward(target, options)
        return target
    if isinstance(target, type):
        if not issubclass(target, torch.nn.Module):
            raise TypeError(f"fuse was given the class {target.__qualname__}: it takes nn.Module classes")
        target.forward = _fused_function(target.forward, options)
        return target
    if not callable(target):
        raise TypeError(
            f"fuse was given {target!r}: it takes a function, an nn.Module class or an nn.Module; options go by name"
        )
    return _fused_function(target, options)


def _fused_function(function: Callable[..., Any], options: Options) -> Callable[..., Any]:
    function = getattr(function, "__fusionpass_original__", function)
    owned = Owned(compiled(function, Backend(options)), options)

    @functools.wraps(function)
    def fused(*args: Any, **kwargs: Any) -> Any:
        if _traced():  # inside somebody's torch.compile or export: theirs is the graph
            return function(*args, **kwargs)
        return owned(*args, **kwargs)

    fused.__fusionpass_original__ = function
    return fused


def _traced() -> bool:
    """Whether a call is being recorded here. `torch.compiler.is_compiling` alone is of the process: while any other thread
    compiled, calls in this one would run unfused."""
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.compiler.is_compiling() and _len_torch_dispatch_stack() > 0


class FusedForward:
    """The `forward` of one fused module instance.

    A plain object in the module's `__dict__`: it travels with deepcopy and pickle, which drop `Module.compile`'s result,
    and compiles on first use.
    """

    def __init__(self, module: torch.nn.Module, options: Options):
        before = module.__dict__.get("forward")
        self.module = module
        self.options = options
        self.replaced = before.replaced if isinstance(before, FusedForward) else before
        self._owned: Owned | None = None

    def _original(self) -> Callable[..., Any]:
        """The forward this one stands for: an earlier one set on the instance, else the class's."""
        if self.replaced is not None:
            return self.replaced
        forward = type(self.module).forward
        return functools.partial(getattr(forward, "__fusionpass_original__", forward), self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _traced():
            return self._original()(*args, **kwargs)
        if self._owned is None:
            self._owned = self._compile()
        return self._owned(*args, **kwargs)

    def _compile(self) -> Owned:
        original = self._original()
        if isinstance(original, functools.partial):
            run = functools.partial(compiled(original.func, Backend(self.options)), self.module)
        else:
            run = torch.compile(original, backend=Backend(self.options))
        return Owned(run, self.options)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_owned": None}

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._original())

    @property
    def __code__(self) -> Any:
        """torch.export looks into it for attributes that a forward assigns."""
        original = self._original()
        return getattr(original, "func", original).__code__

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self._original()
