"""What is held of two runs of one program: the same values but for rounding, and everything else the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from programs import DEVICE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROUNDINGS = 4  # that many roundings of one result in a row are no difference, whatever the program
SEEDS = 3
UNKNOWN = 32


class Rounded(TorchDispatchMode):
    """Rounds every floating result anew: multiplies it by 1 plus at most one unit in the last place, drawn at random."""

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value, declared in zip(tree_leaves(result), func._schema.returns, strict=False):
            fresh = declared.alias_info is None or declared.alias_info.is_write
            if fresh and isinstance(value, Tensor) and value.is_floating_point() and _has_its_own(value):
                draw = (torch.rand(value.shape, generator=self.generator) * 2 - 1).to(value.device)
                value.mul_(1 + draw * torch.finfo(value.dtype).eps)
        return result


def _has_its_own(value: Tensor) -> bool:
    """Whether there are elements, each with memory of its own: nothing can be written into an expanded tensor."""
    return value.numel() > 0 and all(
        stride or size == 1 for size, stride in zip(value.shape, value.stride(), strict=True)
    )


def spread(again: Callable[[], list[Tensor] | None], want: list[Tensor]) -> list[Tensor]:
    """How far each result moves when every step of the program rounds otherwise: what rounding by itself explains.

    Where the program cannot run as Python (only AOTAutograd keeps what a write overwrites, for backward), as many roundings
    of the largest number as a program has steps.
    """
    plain = again()
    if plain is None:
        return [UNKNOWN * _unit(t) * _largest(t) for t in want]
    furthest = [torch.zeros((), dtype=torch.double)] * len(plain)
    for seed in range(SEEDS):
        with Rounded(seed):
            other = again()
        if other is None:
            continue
        for index, (x, y) in enumerate(zip(other, plain, strict=True)):
            moved = (x.double() - y.double()).abs().nan_to_num(0, 0, 0)
            furthest[index] = torch.maximum(furthest[index], moved.max() if moved.numel() else moved.sum())
    return furthest


def described(tensors: list[Tensor]) -> list[tuple]:
    return [(tuple(t.shape), t.dtype, t.stride(), t.storage_offset(), t.requires_grad) for t in tensors]


def aliasing(tensors: list[Tensor]) -> list[list[bool]]:
    keys = [t.untyped_storage().data_ptr() for t in tensors]
    return [[x == y for y in keys] for x in keys]


def assert_same(got: list[Tensor], want: list[Tensor], again: Callable[[], list[Tensor] | None]) -> None:
    """Equal but for rounding. again: runs the program as Python, for how far rounding moves it; asked where it matters."""
    assert len(got) == len(want)
    close = [_close(x, y, torch.zeros((), dtype=torch.double)) for x, y in zip(got, want, strict=True)]
    if all(close):
        return
    allowed = spread(again, want)
    for index, (x, y) in enumerate(zip(got, want, strict=True)):
        if not _close(x, y, allowed[index]):
            off = (x.double() - y.double()).abs().max().item()
            raise AssertionError(
                f"value {index} is off by {off:.3g}, rounding moves it by {allowed[index].item():.3g}:\n{x}\n{y}"
            )


def _unit(t: Tensor) -> float:
    return torch.finfo(t.dtype).eps if t.is_floating_point() else 0.0


def _largest(t: Tensor) -> Tensor:
    finite = t.double()[t.isfinite()]
    return finite.abs().max() if finite.numel() else torch.zeros((), dtype=torch.double, device=t.device)


def _close(x: Tensor, y: Tensor, moved: Tensor) -> bool:
    if not y.is_floating_point():
        return torch.equal(x, y)
    x, y, eps = x.double(), y.double(), torch.finfo(y.dtype).eps
    finite = y.isfinite()
    if not torch.equal(x.isnan(), y.isnan()) or not torch.equal(x[~finite].nan_to_num(), y[~finite].nan_to_num()):
        return False
    if not finite.any():
        return True
    allowed = ROUNDINGS * (eps * _largest(y) + moved)
    return bool((x[finite] - y[finite]).abs().max() <= allowed)


def assert_equal_state(got: Any, want: Any) -> None:
    """Layouts, aliasing and random streams of two `Run`s, exactly."""
    assert described(got.tensors) == described(want.tensors)
    assert aliasing(got.tensors) == aliasing(want.tensors)
    assert all(torch.equal(x, y) for x, y in zip(got.streams, want.streams, strict=True)), (
        "random numbers were drawn otherwise"
    )


def streams() -> list[Tensor]:
    """Where the streams of random numbers stand."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if DEVICE == "cuda" else [])]
