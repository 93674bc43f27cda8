"""What the ops run: our Triton kernels or ATen, by device and dtype, and shapes alone on fake tensors.

Triton is imported when the first tensor arrives that the kernels take. The ATen form runs on a device of any kind.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from fusionpass.kernels import aten, aten_combine, contract

Dtype = torch.dtype | None

ALL = frozenset(contract.DTYPES)
NO_BFLOAT16 = ALL - {torch.bfloat16}
NONE: frozenset[torch.dtype] = frozenset()


@functools.cache
def kernels() -> SimpleNamespace:
    from fusionpass.kernels import (
        gate_projected_add,
        gate_projected_add_backward,
        gated_add,
        gated_add_backward,
        moe_combine,
    )

    return SimpleNamespace(
        gated_add=gated_add,
        gated_add_backward=gated_add_backward,
        gate_projected_add=gate_projected_add,
        gate_projected_add_backward=gate_projected_add_backward,
        moe_combine=moe_combine,
    )


@functools.cache
def interpreted() -> bool:
    """Whether CPU tensors take the Triton kernels; like Triton itself, decided once."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported: a torch with CUDA may come without it, as on Windows."""
    try:
        importlib.import_module("triton")
    except ImportError:
        return False
    return True


@functools.cache
def dtypes_of_gpu(device: torch.device) -> frozenset[torch.dtype]:
    """The dtypes that the kernels take on a CUDA device. Triton compiles bf16 from compute capability 8.0 on."""
    if not has_triton():
        return NONE
    old = torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)
    return NO_BFLOAT16 if old else ALL


def kernel_dtypes(a: Tensor) -> frozenset[torch.dtype]:
    """The dtypes that the kernels take on the tensor's device."""
    if a.is_cuda:
        return dtypes_of_gpu(a.device)
    return ALL if a.is_cpu and interpreted() else NONE


def kernels_take(*tensors: Tensor | None, dtype: Dtype = None) -> bool:
    """Whether the kernels compute an op on these tensors, of one device, with results in `dtype`; else ATen does."""
    taken = kernel_dtypes(tensors[0])
    if taken is ALL or not taken:
        return taken is ALL
    floating = [t.dtype for t in tensors if t is not None and t.is_floating_point()]
    return taken.issuperset(floating if dtype is None else [*floating, dtype])


# gated_add


def gated_add(a: Tensor, gate: Tensor, b: Tensor, *, numerics: str = "fp32", dtype: Dtype = None) -> Tensor:
    if kernels_take(a, gate, b, dtype=dtype):
        return kernels().gated_add.gated_add(a, gate, b, numerics, dtype)
    contract.check_gated_add(a, gate, b, numerics, dtype)
    return aten.gated_add(a, gate, b, numerics, dtype)


def gated_add_fake(a: Tensor, gate: Tensor, b: Tensor, *, numerics: str = "fp32", dtype: Dtype = None) -> Tensor:
    contract.check_gated_add(a, gate, b, numerics, dtype)
    return (a + torch.sigmoid(gate) * b).to(contract.result_dtype(dtype, a, gate, b))


def gated_add_out(a: Tensor, gate: Tensor, b: Tensor, out: Tensor) -> None:
    if kernels_take(a, gate, b, out):
        kernels().gated_add.launch(out, a, gate, b, "fp32")
    else:
        aten.gated_add_into(out, a, gate, b)
    if not out.is_inference():
        # It has new contents: a graph that saved the old ones must refuse to use them.
        torch.autograd.graph.increment_version(out)


def gated_add_backward(dy: Tensor, gate: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if kernels_take(dy, gate, b) and kernels().gated_add_backward.fits(dy, gate, b):
        return kernels().gated_add_backward.gradients(dy, gate, b)
    return gated_add_backward_aten(dy, gate, b)


def gated_add_backward_aten(dy: Tensor, gate: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    _, dgate, db = aten.gated_add_gradients(dy, gate, b, "fp32", (False, True, True), (dy.dtype, b.dtype))
    return dgate, db


# gate_projected_add


def gate_projected_add(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *, dtype: Dtype = None
) -> Tensor:
    if kernels_take(x, weight, bias, a, b, dtype=dtype):
        return kernels().gate_projected_add.gate_projected_add(x, weight, bias, a, b, dtype)
    contract.check_gate_projected_add(x, weight, bias, a, b, dtype)
    return aten.gate_projected_add(x, weight, bias, a, b, dtype)


def gate_projected_add_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *, dtype: Dtype = None
) -> Tensor:
    contract.check_gate_projected_add(x, weight, bias, a, b, dtype)
    return (a + torch.sigmoid(a.new_empty((*a.shape[:-1], 1))) * b).to(contract.result_dtype(dtype, x, a, b))


def gate_projected_add_and_logit(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *, dtype: Dtype = None
) -> tuple[Tensor, Tensor]:
    if kernels_take(x, weight, bias, a, b, dtype=dtype):
        return kernels().gate_projected_add.gate_projected_add_and_logit(x, weight, bias, a, b, dtype)
    contract.check_gate_projected_add(x, weight, bias, a, b, dtype)
    return aten.gate_projected_add_and_logit(x, weight, bias, a, b, dtype)


def gate_projected_add_and_logit_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *, dtype: Dtype = None
) -> tuple[Tensor, Tensor]:
    y = gate_projected_add_fake(x, weight, bias, a, b, dtype=dtype)
    return y, x.new_empty((*a.shape[:-1], 1))


def gate_projected_add_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor, logit: Tensor, b: Tensor, rows: Sequence[int], need_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    operands = dy, x, weight, logit, b
    if kernels_take(*operands) and kernels().gate_projected_add_backward.fits(*operands):
        return _all_tensors(*kernels().gate_projected_add_backward.gradients(*operands, rows, need_bias))
    return gate_projected_add_backward_aten(*operands, rows, need_bias)


def gate_projected_add_backward_aten(
    dy: Tensor, x: Tensor | None, weight: Tensor, logit: Tensor, b: Tensor, rows: Sequence[int], need_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs = True, x is not None, need_bias, False, True
    dtypes = dy.dtype, b.dtype
    dx, dweight, dbias, _, db = aten.gate_projected_add_gradients(dy, None, x, weight, logit, b, needs, dtypes)
    return _all_tensors(dx.reshape(*rows, weight.numel()).contiguous(), dweight, dbias, db)


def _all_tensors(
    dx: Tensor, dweight: Tensor | None, dbias: Tensor | None, db: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An op has no optional results: one that was not asked for is an empty tensor."""
    return dx, dx.new_empty(0) if dweight is None else dweight, dx.new_empty(0) if dbias is None else dbias, db


# moe_combine

COMBINE_TENSORS = 11  # of its arguments, in front of four numbers and a dtype


def combine_arguments(
    a: Tensor,
    b: Tensor,
    *,
    gate: Tensor | None = None,
    x: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    topk_weights: Tensor | None = None,
    inverse: Tensor | None = None,
    masked: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    top_k: int = 0,
    permuted: bool = False,
    eps: float | None = None,
    offset: float = 0.0,
    dtype: Dtype = None,
) -> tuple:
    """The arguments in the order in which the kernel and the expression take them."""
    tensors = (a, b, gate, x, gate_weight, gate_bias, topk_weights, inverse, masked, residual, norm_weight)
    return *tensors, top_k, permuted, eps, offset, dtype


def moe_combine(a: Tensor, b: Tensor, **options) -> tuple[Tensor, Tensor]:
    arguments = combine_arguments(a, b, **options)
    if kernels_take(*arguments[:COMBINE_TENSORS], dtype=arguments[-1]):
        return kernels().moe_combine.moe_combine(*arguments)
    check_combine(a, b, options)
    return aten_combine.moe_combine_expression(*arguments)


def moe_combine_fake(a: Tensor, b: Tensor, **options) -> tuple[Tensor, Tensor]:
    check_combine(a, b, options)
    shape = b.shape if options.get("residual") is None else options["residual"].shape
    dtype = combined_dtype(a, b, **options)
    normed = (0,) if options.get("eps") is None else shape
    return b.new_empty(shape, dtype=dtype), b.new_empty(normed, dtype=dtype)


def combined_dtype(a: Tensor, b: Tensor, **options) -> torch.dtype:
    """Of both results."""
    given = (options.get(name) for name in ("gate", "x", "residual"))
    return contract.combined_dtype(options.get("dtype"), a, b, *given)


def check_combine(a: Tensor, b: Tensor, options: dict) -> None:
    """Raises RuntimeError outside the op's contract."""
    plain = ("top_k", "permuted", "eps", "offset", "dtype")
    named = {"a": a, "b": b} | {name: value for name, value in options.items() if name not in plain}
    defaults = ("top_k", 0), ("permuted", False), ("eps", None), ("dtype", None)
    contract.check_moe_combine(named, *(options.get(name, other) for name, other in defaults))
