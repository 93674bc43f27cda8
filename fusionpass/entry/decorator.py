"""`fuse`: the pass as a decorator, on a function, a `forward`, an `nn.Module` class or an instance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fusionpass.entry.fused_function import fused_function, original_of
from fusionpass.entry.fused_module import FusedForward, follow_copies
from fusionpass.options import Options

Target = TypeVar("Target")


def fuse(target: Any = None, /, *, inner: str | Callable[..., Any] = "eager", **options: Any) -> Any:
    """Compile `target` with the pass in front of `inner`.

    Args:
        target: a function or `forward` (returns the fused function), an `nn.Module` class (its `forward` is replaced, for
            all instances; returns the class), or an `nn.Module` instance (its `forward` is replaced; returns the
            instance). Left out, `fuse(...)` returns the decorator.
        inner: what compiles the rewritten graph: "eager" (runs it as it is), "aot_eager", "cudagraphs", "inductor", the name
            of any registered backend, or a callable.
        options: `rules`, `numerics`, `profitable_only`, `strict`, `verify`, `mode`, `inductor`; see
            `fusionpass.options.Options`.

    A fused module keeps its class and its parameters' names. It stays fused through copy, deepcopy, pickle and the
    replicas of nn.DataParallel, each with its own parameters. `del module.forward` takes the fusion off an instance
    again.

    Inside somebody's `torch.compile` the graph and the backend are theirs. The sums written in `target` are rewritten there
    before their backend gets the graph, with these options except `inner`, `mode` and `inductor`. `torch.export`, `make_fx`,
    `torch.fx.symbolic_trace`, `torch.jit.trace` and transforms of `torch.func` get `target` as it is written. One
    warning then names what to do; under `strict` they raise.

    Raises:
        TypeError: `target` cannot be called.
        ValueError: an unknown option or value.
        NothingRewritten: on a call, under `strict`, if no rewritten site ran in it.
        VerificationFailed: on a call, under `verify`, if a site computed something else than its nodes.

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
        target.forward = FusedForward.on(target, options)
        follow_copies(type(target))
        return target
    if isinstance(target, type):
        if not issubclass(target, torch.nn.Module):
            raise TypeError(f"fuse was given the class {target.__qualname__}: it takes nn.Module classes")
        target.forward = fused_function(original_of(target.forward), options)
        return target
    if not callable(target):
        raise TypeError(
            f"fuse was given {target!r}: it takes a function, an nn.Module class or an nn.Module; give options by name"
        )
    if isinstance(target, FusedForward):
        target = target.__wrapped__
    return fused_function(original_of(target), options)
