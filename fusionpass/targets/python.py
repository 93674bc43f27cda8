"""Targets in Python code: `file.py:name` and `package.module:name`. Resolving one runs that code."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fusionpass.targets.inputs import as_call, from_spec, moved
from fusionpass.targets.types import Target, TargetError, ensure_device, first_line


def from_python(
    target: str, *, input_specs: Sequence[str] = (), device: str | None = None, dtype: torch.dtype | None = None
) -> Target:
    """The module or function that `target` names, with the inputs of one call.

    Args:
        target: `file.py:name` or `package.module:name`.
        input_specs: `dtype[sizes]` of each positional input, in the place of `example_inputs`.
        device: the device to which module and inputs are moved. None moves nothing, and makes specs on the module's device.
        dtype: the dtype to which floating parameters and inputs are cast. None leaves them as they are.
    """
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise TargetError(f"{target!r} does not say what to capture: write FILE.py:NAME or PACKAGE.MODULE:NAME")
    module = _load_file(place) if place.endswith(".py") or os.sep in place else _load_module(place)
    model = _callable_of(_lookup(module, name, target), target)
    if isinstance(model, torch.nn.Module) and model.forward == types.MethodType(torch.nn.Module.forward, model):
        raise TargetError(
            f"{target!r} is {type(model).__name__}, which has no forward: name a module that can be called"
        )
    chosen = ensure_device(device) if device is not None else None
    if isinstance(model, torch.nn.Module) and (chosen is not None or dtype is not None):
        model = _moved_module(model, chosen, dtype, target)
    args, kwargs = _inputs(module, model, target, input_specs, chosen)
    if not input_specs and (chosen is not None or dtype is not None):
        args, kwargs = moved(args, chosen, dtype), moved(kwargs, chosen, dtype)
    _ensure_binds(model, args, kwargs, target)
    return Target(name=target, model=model, args=args, kwargs=kwargs)


def _load_file(place: str) -> types.ModuleType:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise TargetError(f"there is no file {place!r}: check the path, it is looked up from {os.getcwd()}")
    name = path.stem if path.stem.isidentifier() and path.stem not in sys.modules else f"_target_{abs(hash(path)):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TargetError(f"{place!r} is no Python source file: write FILE.py:NAME")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look the module up by name while it runs
    sys.path.insert(0, str(path.parent))  # as `python file.py` does, so that its own imports work
    try:
        _guarded(lambda: spec.loader.exec_module(module), place)
    except TargetError:
        del sys.modules[name]
        raise
    return module


def _load_module(place: str) -> types.ModuleType:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m package.module` does
    try:
        found = importlib.util.find_spec(place)
    except (ImportError, ValueError):  # a parent package is missing; the name is no module name
        found = None
    if found is None:
        raise TargetError(f"there is no module {place!r}: check the name, or give a file as FILE.py:NAME")
    return _guarded(lambda: importlib.import_module(place), place)


def _guarded(run: Callable[[], Any], what: str) -> Any:
    """Call `run()`. If the user's code raises anything, the error is told in one line."""
    try:
        return run()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise TargetError(
            f"running {what!r} failed with {type(error).__name__}: {first_line(error)}; "
            "FUSIONPASS_TRACEBACK=1 shows the traceback"
        ) from error


def _lookup(module: types.ModuleType, name: str, target: str) -> Any:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            public = [each for each in vars(found) if not each.startswith("_")] if hasattr(found, "__dict__") else []
            close = difflib.get_close_matches(part, public, n=3) or public[:5]
            hint = f"it has {', '.join(close)}" if close else "it has no public names"
            raise TargetError(f"{target!r} names {part!r}, which is not there: {hint}")
        found = getattr(found, part)
    return found


def _callable_of(found: Any, target: str) -> Callable[..., Any]:
    """The module or function to capture. An instance or function is taken as it is; a class or a factory is called."""
    if isinstance(found, torch.nn.Module):
        return found
    if inspect.isclass(found):
        if not issubclass(found, torch.nn.Module):
            raise TargetError(f"{target!r} is the class {found.__name__}, no nn.Module: name a module or a function")
        required = _required(found)
        if required:
            raise TargetError(
                f"{target!r} is a class that needs {', '.join(required)}: "
                "name a function of no arguments that builds it"
            )
        return _guarded(found, target)
    if not callable(found):
        kind = type(found).__name__
        raise TargetError(f"{target!r} is of type {kind}: name an nn.Module, its class, a function or a factory")
    if not inspect.isroutine(found) or _required(found):
        return found
    made = _guarded(found, target)  # needs no argument: a factory, unless it returns no module
    return made if isinstance(made, torch.nn.Module) or inspect.isfunction(made) else found


def _required(found: Callable[..., Any]) -> list[str]:
    """Names of the parameters without a default. For a builtin without a signature: one placeholder."""
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return ["arguments"]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each.name for each in parameters if each.default is each.empty and each.kind not in variadic]


def _moved_module(model: torch.nn.Module, device, dtype, target: str) -> torch.nn.Module:
    try:
        return model.to(device=device, dtype=dtype)
    except (RuntimeError, NotImplementedError) as error:
        raise TargetError(
            f"{target!r} could not be moved to {device or dtype}: {first_line(error)}; leave out --device and --dtype"
        ) from error


def _inputs(module: types.ModuleType, model: Callable[..., Any], target: str, specs: Sequence[str], device):
    if specs:
        where = device or _device_of(model)
        return tuple(from_spec(spec, where) for spec in specs), {}
    for owner, words in ((module, "example_inputs"), (model, f"{target}.example_inputs")):
        if hasattr(owner, "example_inputs"):
            return as_call(owner.example_inputs, words)
    forward = model.forward if isinstance(model, torch.nn.Module) else model
    if not _required(forward):
        return (), {}
    raise TargetError(
        f"{target!r} has no inputs: put example_inputs = (tensor, ...) beside it, "
        f'or give --input "bf16[64,2048]" for each of {", ".join(_required(forward))}'
    )


def _device_of(model: Any) -> torch.device:
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, torch.nn.Module) else []
    return tensors[0].device if tensors else torch.device("cpu")


def _ensure_binds(model: Callable[..., Any], args: tuple, kwargs: dict, target: str) -> None:
    forward = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        inspect.signature(forward).bind(*args, **kwargs)
    except TypeError as error:
        given = len(args) + len(kwargs)
        inputs = "1 input, which does" if given == 1 else f"{given} inputs, which do"
        raise TargetError(f"{target!r} was given {inputs} not fit its signature: {error}") from error
    except ValueError:  # a builtin without a signature: the call itself will tell
        return
