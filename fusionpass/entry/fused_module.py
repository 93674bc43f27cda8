"""The `forward` of one fused module instance, and how it follows the module's copies."""

from __future__ import annotations

import copyreg
import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch

from fusionpass.entry.fused_function import original_of, rebindable
from fusionpass.options import Options


class FusedForward:
    """A fused function bound to a module like a bound method: `__self__`, `__func__`, `__code__` and so on.

    It is a plain object in the module's `__dict__`, so deepcopy and pickle keep it. (They drop the result of
    `Module.compile`.) Shallow copies share the `__dict__`'s values; see `follow_copies`.
    """

    def __init__(self, module: torch.nn.Module, options: Options, replaced: Callable[..., Any] | None):
        self.module = module
        self.options = options
        self.replaced = replaced  # the forward that was set on the instance before
        self._renew()

    @classmethod
    def on(cls, module: torch.nn.Module, options: Options) -> FusedForward:
        """Fuse the forward that the instance has now. An earlier fusion of it is replaced."""
        before = module.__dict__.get("forward")
        if isinstance(before, cls):
            before = before.replaced
        return cls(module, options, original_of(before))

    def _renew(self) -> None:
        self._stands_for = type(self.module).forward
        function = original_of(self._stands_for) if self.replaced is None else self.replaced
        self._fused = rebindable(function, self.options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.replaced is not None:
            return self._fused(*args, **kwargs)
        if self._stands_for is not type(self.module).forward:  # the class was patched after the fusion
            self._renew()
        return self._fused(self.module, *args, **kwargs)

    def of(self, module: torch.nn.Module) -> FusedForward:
        """The same for a shallow copy of the module. nn.DataParallel makes copies in every step, so nothing is built
        again."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.module = module
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "options": self.options, "replaced": self.replaced}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._renew()

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The forward that this one replaces."""
        if self.replaced is not None:
            return self.replaced
        return types.MethodType(original_of(type(self.module).forward), self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__wrapped__)

    @property
    def __self__(self) -> torch.nn.Module:
        return self.module

    @property
    def __func__(self) -> Callable[..., Any]:
        """The function that takes the module first, for code that wraps a forward and binds it again, as accelerate does."""
        if self.replaced is not None:
            raise AttributeError("a forward that was set on the instance has no function that takes the module first")
        return self._fused

    def __getattr__(self, name: str) -> Any:
        """What tracers look for on a function: `__code__`, `__globals__`, `__name__`, ..."""
        if name in _OF_FUNCTIONS and "module" in self.__dict__:
            return getattr(self.__wrapped__, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


_OF_FUNCTIONS = frozenset(
    "__code__ __globals__ __closure__ __defaults__ __kwdefaults__ __name__ __qualname__ __annotations__".split()
)


def follow_copies(cls: type[torch.nn.Module]) -> None:
    """Let shallow copies of the class's instances call their own fused forward.

    A shallow copy shares the values of `__dict__`, also the forward that is bound to the original, and nothing tells the
    instance of the copy. So this class changes the two ways to make one, `copy.copy` and nn.DataParallel's replicas: they do
    what they did before, and then bind the forward again. Instances that are not fused are copied as before. If you copy a
    `__dict__` by hand, set `forward` too, with `fuse(copy)`.
    """
    for name, usual in (("__copy__", _copy), ("_replicate_for_data_parallel", None)):
        before = getattr(cls, name, None) or usual
        if before not in _FOLLOWING:
            following = _following(before)
            _FOLLOWING.add(following)
            setattr(cls, name, following)


_FOLLOWING: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()


def _following(before: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(before)
    def copied(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        new = before(self, *args, **kwargs)
        forward = getattr(new, "__dict__", {}).get("forward")
        if isinstance(forward, FusedForward) and forward.module is not new:
            new.__dict__["forward"] = forward.of(new)
        return new

    return copied


def _copy(self: torch.nn.Module) -> Any:
    """What `copy.copy` does for a class without `__copy__`."""
    reduce = copyreg.dispatch_table.get(type(self))
    made = reduce(self) if reduce is not None else self.__reduce_ex__(4)
    make, args, state, items, pairs = (*made, None, None, None)[:5]
    new = make(*args)
    if state is not None:
        new.__setstate__(state)
    for item in items or ():
        new.append(item)
    for key, value in pairs or ():
        new[key] = value
    return new
