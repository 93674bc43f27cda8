"""Why no graph ran in a call: Dynamo is off, met its recompile limit, skipped the function, or found nothing to do."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, MethodType
from typing import Any

import torch

from fusionpass.private import (
    _are_functorch_transforms_active,
    _debug_get_cache_entry_list,
    _len_torch_dispatch_stack,
)


@dataclass(frozen=True)
class Unseen:
    """Attributes:
    code: "off", "limit", "skipped", "generator" or "empty".
    sentence: the same in words, with the values.
    """

    code: str
    sentence: str


def why_off() -> str:
    """What keeps Dynamo from compiling any call at the moment; "" if nothing does."""
    from fusionpass.private import _stance

    if os.environ.get("TORCHDYNAMO_DISABLE", "") == "1":
        return "the environment variable TORCHDYNAMO_DISABLE is 1"
    if torch._dynamo.config.disable:
        return "torch._dynamo.config.disable (environment variable TORCH_COMPILE_DISABLE) is set"
    if _stance.stance not in ("default", "fail_on_recompile"):
        return f"torch.compiler.set_stance({_stance.stance!r}) is in force"
    if _len_torch_dispatch_stack():
        return "a TorchDispatchMode is active, under which Dynamo compiles nothing"
    if _are_functorch_transforms_active():
        return "a transform of torch.func is active around the call, under which Dynamo may skip it"
    return ""


def why_unseen(run: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Unseen:
    """Why `run(*args, **kwargs)`, which gave `result`, ran no graph. `run` comes from `torch.compile`."""
    off = why_off()
    if off:
        return Unseen("off", f"0 rewritten: the call ran as it was written, since {off}")
    if inspect.isgenerator(result) or inspect.iscoroutine(result) or inspect.isasyncgen(result):
        kind = type(result).__name__.replace("_", " ")
        return Unseen(
            "generator",
            f"0 rewritten: the call returned a {kind}, whose body is not compiled: fuse a plain function that it calls",
        )
    function, args = called(run, args)
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        return Unseen("skipped", _skipped(str(getattr(function, "__qualname__", function))))
    if served(function, None, args, kwargs):
        return Unseen(
            "empty", "0 rewritten: no graph was compiled, since the call ran no tensor operation that Dynamo sees"
        )
    times = len(_debug_get_cache_entry_list(code))
    if times == 0:
        return Unseen("skipped", _skipped(function.__qualname__))
    return Unseen("limit", _past_limit(function.__qualname__, times))


def _skipped(name: str) -> str:
    return (
        f"0 rewritten: no graph was compiled: Dynamo found no tensor operation in {name}, in this call or an earlier one, "
        "or skipped it (TORCH_LOGS='+dynamo' says why)"
    )


def _past_limit(name: str, times: int) -> str:
    config = torch._dynamo.config
    which = "accumulated_recompile_limit" if times >= config.accumulated_recompile_limit else "recompile_limit"
    limit = getattr(config, which)
    compiled = f"{name} was compiled {times} time{'s' if times > 1 else ''}"
    if times < limit:
        return (
            f"0 rewritten: no graph ran: {compiled}, and for this call Dynamo found no tensor operation or gave up, "
            "now or earlier (TORCH_LOGS='+dynamo' says why; torch._dynamo.reset() has it try again)"
        )
    return (
        f"0 rewritten: the call ran as it was written, past Dynamo's limit: {compiled}, and "
        f"torch._dynamo.config.{which} is {limit}; raise it before the first call, mark sizes that vary with "
        "torch._dynamo.mark_dynamic, or vary fewer arguments (TORCH_LOGS=recompiles names them)"
    )


def called(run: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, tuple[Any, ...]]:
    """The function that Dynamo sees in a call of `run`, and its positional arguments. `run` comes from `torch.compile`."""
    args = tuple(args)
    while True:
        if isinstance(run, functools.partial):
            args, run = (*run.args, *args), run.func
        elif isinstance(run, MethodType):
            args, run = (run.__self__, *args), run.__func__
        elif isinstance(run, torch.nn.Module):
            run = run.forward
        elif hasattr(run, "compiled_for"):  # fusionpass.entry.instances
            run = run.compiled_for(args)
        elif getattr(run, "_torchdynamo_wrapper_id", None) == id(run):
            run = run._torchdynamo_orig_callable
        else:
            return run, args


def served(function: Any, backend: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call would run what Dynamo has compiled of `function`, by `backend` (None: by any)."""
    entries = _debug_get_cache_entry_list(function.__code__)
    if not entries:
        return False
    try:
        bound = inspect.signature(function, follow_wrapped=False).bind(*args, **kwargs)
    except TypeError:  # the arguments do not fit the function: the call itself raises
        return False
    bound.apply_defaults()
    free = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    values = {name: cell.cell_contents for name, cell in free if _filled(cell)}
    values.update(bound.arguments)
    return any(entry.guard_manager.check(values) for entry in entries if backend in (None, _backend_of(entry)))


def _backend_of(entry: Any) -> Any:
    """The backend that was given to torch.compile, without torch.compile's wrapper."""
    return getattr(entry.backend, "compiler_fn", entry.backend)


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018  an empty cell raises
    except ValueError:
        return False
    return True
