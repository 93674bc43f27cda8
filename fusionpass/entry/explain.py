"""`explain(model)(*args)`: compile afresh, run once, report over all graphs and graph breaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fusionpass.entry.backend import Backend
from fusionpass.entry.collecting import collector
from fusionpass.entry.instances import compiled
from fusionpass.entry.nothing_rewritten import Owned
from fusionpass.options import Options
from fusionpass.report import Report


def explain(model: Callable[..., Any], **options: Any) -> Callable[..., Report]:
    """What the pass would do to `model`: `explain(model)(*args, **kwargs)` returns a `Report`.

    Like `torch._dynamo.explain`, it drops everything that Dynamo has compiled so far, also of other models, because a cached
    graph would not be seen again. The model runs once, with its side effects, in the caller's grad mode.

    Args:
        model: an `nn.Module` or function.
        options: as for `fusionpass.fuse`.

    Raises:
        TypeError: `model` cannot be called.
        ValueError: an unknown option or value.
        NothingRewritten: under `strict`, when no site was rewritten.
    """
    if not callable(model):
        raise TypeError(f"explain was given {model!r}: it takes an nn.Module or a function, then the call's arguments")
    chosen = Options.from_user(options)

    def run(*args: Any, **kwargs: Any) -> Report:
        return _capture(model, args, kwargs, chosen)

    return run


def capture(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    target: str = "",
    keep_code: bool = False,
    **options: Any,
) -> Report:
    """`explain`, with the target's name in the report and, on request, every graph's code before and after."""
    return _capture(model, args, kwargs, Options.from_user(options), target=target, keep_code=keep_code)


def _capture(model, args, kwargs, options: Options, *, target: str = "", keep_code: bool = False) -> Report:
    from fusionpass.private import reset

    reset()
    owned = Owned(compiled(model, Backend(options)), options)
    with collector(target=target, keep_code=keep_code) as active:
        try:
            owned(*args, **kwargs)
        finally:
            reset()  # the graphs above carry counters, so nobody else should run them
    return active.report
