"""While Inductor traces, the ops are what Inductor makes the best of: a launch of our kernel, or the plain expression.

An opaque op costs Inductor's code a call through the dispatcher, 50 to 80 us of CPU time on an H100 host on which an eager
kernel takes 15: in a decode step without CUDA graphs that is more than the launches it replaces. So on a CUDA device

    moe_combine, gate_projected_add   are allocations and one kernel launch, which Inductor makes as it makes its own
    gated_add                         is a + sigmoid(gate) * b, which Inductor's kernel ties with and its neighbours can join

and where the ops are ATen expressions anyway, as on a CPU, all are; but with numerics="eager" `gated_add` stays an op, whose
bits Inductor's code does not give. AOTInductor gets the same, so that its packages call no
Python. Elsewhere (eager, aot_eager, export) an op stays one node: functionalization would clone the results of the
launch.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusionpass import library
from fusionpass.implementations import (
    COMBINE_TENSORS,
    check_combine,
    combine_arguments,
    combined_dtype,
    has_triton,
    interpreted,
    kernels,
    kernels_take,
)
from fusionpass.kernels import aten, aten_combine, contract
from fusionpass.private import FunctionalTensorMode, triton_ops_to_kernels
from fusionpass.tensors import known_contiguous


class _State(threading.local):
    """Per thread: whether Inductor is tracing a graph that this package handed it."""

    tracing = False


_state = _State()


@contextmanager
def ops_opened(wanted: bool) -> Iterator[None]:
    """Inside the block, with `wanted`, a trace finds what an op is made of in place of the op."""
    if wanted and torch.cuda.is_available() and has_triton() and not interpreted():
        _tell_the_cache()
    before, _state.tracing = _state.tracing, wanted
    try:
        yield
    finally:
        _state.tracing = before


@functools.cache
def _tell_the_cache() -> None:
    """AOTAutograd's cache keys a graph on the sources of the Triton kernels that its ops are known to launch: a changed
    kernel is then a miss. It asks this table, which `triton_op` fills for its own ops (torch 2.11 to 2.14)."""
    for op in (library.moe_combine, library.gate_projected_add):
        triton_ops_to_kernels.setdefault(op._name, [kernels().moe_combine.moe_combine_kernel])


def _ahead_of_time() -> bool:
    """Whether AOTInductor is tracing, to which no backend of ours leads."""
    virtualized = sys.modules.get("torch._inductor.virtualized")
    return virtualized is not None and virtualized.V.aot_compilation is True


def _opened(mode: Any, op: Any, types: Sequence[type], args: Sequence = (), kwargs: dict | None = None) -> Any:
    """What functionalization makes of an op."""
    options, packaged = kwargs or {}, _ahead_of_time()
    if not (_state.tracing or packaged) or interpreted():
        return mode.__torch_dispatch__(op, types, args, options)
    with mode:
        result = _INSIDE[op](*args, **options)
    if result is None and packaged:
        raise RuntimeError(
            f"AOTInductor cannot package this {op}, which the package would have to call in Python: export the hidden size "
            "as a number and rewrite with numerics='fp32', or package the program unrewritten"
        )
    return mode.__torch_dispatch__(op, types, args, options) if result is None else result


def _gated_add(
    a: Tensor, gate: Tensor, b: Tensor, *, numerics: str = "fp32", dtype: torch.dtype | None = None
) -> Tensor | None:
    if numerics != "fp32":  # Inductor would keep float32 where eager rounds, and has a sigmoid of its own
        return None
    contract.check_gated_add(a, gate, b, numerics, dtype)
    return aten.gated_add_expression(a, gate, b, numerics, dtype)


def _gate_projected_add(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *, dtype: torch.dtype | None = None
) -> Tensor | None:
    contract.check_gate_projected_add(x, weight, bias, a, b, dtype)
    if not kernels_take(a, x, weight, bias, b, dtype=dtype):
        return aten.gate_projected_add_expression(x, weight, bias, a, b, dtype)
    columns = a.shape[-1]
    if not (
        known_contiguous(a) and known_contiguous(b) and isinstance(columns, int) and columns <= contract.MOST_COLUMNS
    ):
        return None  # the result would be laid out otherwise than eager does, or a row is too long for one program
    final = contract.result_dtype(dtype, x, a, b)
    result = _launched(a, b, x=x, gate_weight=weight, gate_bias=bias, dtype=final)
    return None if result is None else result[0]


def _moe_combine(a: Tensor, b: Tensor, **options: Any) -> tuple[Tensor, Tensor] | None:
    check_combine(a, b, options)
    arguments = combine_arguments(a, b, **options)
    if not kernels_take(*arguments[:COMBINE_TENSORS], dtype=arguments[-1]):
        return aten_combine.moe_combine_expression(*arguments)
    return _launched(a, b, **options)


def _launched(a: Tensor, b: Tensor, **options: Any) -> tuple[Tensor, Tensor] | None:
    """Allocations and a launch; None where more than the number of rows is not known as a number, or there may be none."""
    x, dtype = options.get("x"), combined_dtype(a, b, **options)
    if x is not None and statically_known_true(x.shape[-1] == 0):  # for no columns the kernel does not compile
        options |= {"gate": aten.constant_logit(options.get("gate_bias"), x, b.shape[:-1])}
        options |= dict.fromkeys(("x", "gate_weight", "gate_bias"))
    *tensors, top_k, permuted, eps, offset, _ = combine_arguments(a, b, **options)
    if not statically_known_true(b.numel() > 0):
        return None
    kernel = kernels().moe_combine
    rows = kernel.rows_of(kernel.ordered(*tensors))
    columns = [tensor.shape[-1] for tensor in (b, options.get("x")) if tensor is not None]
    strides = [stride for tensor in rows.values() if tensor is not None for stride in tensor.stride()]
    if not all(isinstance(n, int) for n in (*columns, *strides)):
        return None
    shape = b.shape if options.get("residual") is None else options["residual"].shape
    total = torch.empty(shape, dtype=dtype, device=b.device)
    normed = torch.empty((0,) if eps is None else shape, dtype=dtype, device=b.device)
    numbers, warps = kernel.arguments(rows, dtype, top_k, permuted, eps, offset, dependent=False)
    first = rows["b"]
    pointers = [first if tensor is None else tensor for tensor in rows.values()]
    launch = torch.library.wrap_triton(kernel.moe_combine_kernel)[(first.shape[0],)]
    launch(*pointers, total, normed, *numbers, num_warps=warps)
    return total, normed


_INSIDE: dict[Any, Callable] = {
    library.gated_add: _gated_add,
    library.gate_projected_add: _gate_projected_add,
    library.moe_combine: _moe_combine,
}
for _op in _INSIDE:
    torch.library.register_torch_dispatch(_op, FunctionalTensorMode, _opened, lib=library.LIBRARY)
