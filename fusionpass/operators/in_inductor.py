"""While Inductor traces, an op becomes what suits Inductor best: a launch of our kernel, or the plain expression.

An opaque op costs Inductor's code a call through the dispatcher, which is several times the CPU time of an eager
kernel. In a decode step without CUDA graphs this is more than the launches that it replaces (`bench/measured.md`). So
on a CUDA device an op becomes allocations and one kernel launch, which Inductor makes like its own. If Inductor's
kernel is as fast as ours, the op becomes its expression, so that neighbours can be fused into it. Where the ops are
ATen expressions anyway, as on a CPU, all of them become expressions. Each op's `under_inductor` decides. AOTInductor
gets the same, so that its packages call no Python. Elsewhere (eager, aot_eager, export) an op stays one node:
functionalization would clone the results of the launch.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fusionpass.operators.implementations import has_triton, interpreted
from fusionpass.private import FunctionalTensorMode, triton_ops_to_kernels


class _State(threading.local):
    """Per thread: whether Inductor is tracing a graph that this package handed it."""

    tracing = False


_state = _State()


@contextmanager
def ops_opened(wanted: bool) -> Iterator[None]:
    """Inside the block, if `wanted`, a trace finds in place of an op what the op is made of."""
    if wanted and torch.cuda.is_available() and has_triton() and not interpreted():
        _tell_the_cache()
    before, _state.tracing = _state.tracing, wanted
    try:
        yield
    finally:
        _state.tracing = before


_launches: dict[Any, Callable[[], list]] = {}  # op -> the Triton kernels that its form here launches


@functools.cache
def _tell_the_cache() -> None:
    """Enter our kernels into torch's table of the Triton kernels that an op launches. AOTAutograd's cache keys a graph
    on the sources of these, so a changed kernel is a miss. `triton_op` fills the table for its own ops (torch 2.11 to
    2.14)."""
    for op, launches in _launches.items():
        triton_ops_to_kernels.setdefault(op._name, launches())


def _ahead_of_time() -> bool:
    """Whether AOTInductor is tracing. It does not go through a backend of ours."""
    virtualized = sys.modules.get("torch._inductor.virtualized")
    return virtualized is not None and virtualized.V.aot_compilation is True


def _opened(
    inside: Callable[..., Any],
    mode: Any,
    op: Any,
    types: Sequence[type],
    args: Sequence = (),
    kwargs: dict | None = None,
) -> Any:
    """What functionalization makes of an op: the result of `inside`, or the op itself if that is None."""
    options, packaged = kwargs or {}, _ahead_of_time()
    if not (_state.tracing or packaged) or interpreted():
        return mode.__torch_dispatch__(op, types, args, options)
    with mode:
        result = inside(*args, **options)
    if result is None and packaged:
        raise RuntimeError(
            f"AOTInductor cannot package this {op}, which the package would have to call in Python: export the hidden size "
            "as a number and rewrite with numerics='fp32', or package the program unrewritten"
        )
    return mode.__torch_dispatch__(op, types, args, options) if result is None else result


def register(
    op: Any, inside: Callable[..., Any], launches: Callable[[], list] | None, library: torch.library.Library
) -> None:
    """Let Inductor's traces find, in place of the op, what `inside` makes of its arguments.

    launches: the Triton kernels that `inside` launches.
    """
    opened = functools.partial(_opened, inside)
    torch.library.register_torch_dispatch(op, FunctionalTensorMode, opened, lib=library)
    if launches is not None:
        _launches[op] = launches
