"""What the ops run: Triton where a CUDA tensor arrives, ATen on a CPU, and shapes alone on fake tensors.

Triton is imported when the first CUDA tensor arrives, or CPU tensor under Triton's interpreter.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from fusionpass.kernels import aten, aten_combine, contract


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


# gated_add


def gated_add_cuda(a: Tensor, gate: Tensor, b: Tensor, *, numerics: str = "fp32") -> Tensor:
    return kernels().gated_add.gated_add(a, gate, b, numerics)


def gated_add_cpu(a: Tensor, gate: Tensor, b: Tensor, *, numerics: str = "fp32") -> Tensor:
    if interpreted():
        return gated_add_cuda(a, gate, b, numerics=numerics)
    contract.check_gated_add(a, gate, b, numerics)
    return aten.gated_add(a, gate, b, numerics)


def gated_add_fake(a: Tensor, gate: Tensor, b: Tensor, *, numerics: str = "fp32") -> Tensor:
    contract.check_gated_add(a, gate, b, numerics)
    return a + torch.sigmoid(gate) * b


def gated_add_out_cuda(a: Tensor, gate: Tensor, b: Tensor, out: Tensor) -> None:
    kernels().gated_add.launch(out, a, gate, b, "fp32")
    _written(out)


def gated_add_out_cpu(a: Tensor, gate: Tensor, b: Tensor, out: Tensor) -> None:
    if interpreted():
        return gated_add_out_cuda(a, gate, b, out)
    aten.gated_add_into(out, a, gate, b)
    _written(out)


def _written(out: Tensor) -> None:
    """Tell autograd that `out` has new contents, so that a graph that saved the old ones refuses to use them."""
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)


def gated_add_backward_cuda(dy: Tensor, gate: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    kernel = kernels().gated_add_backward
    if kernel.fits(dy, gate, b):
        return kernel.gradients(dy, gate, b)
    return gated_add_backward_aten(dy, gate, b)


def gated_add_backward_cpu(dy: Tensor, gate: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return gated_add_backward_cuda(dy, gate, b) if interpreted() else gated_add_backward_aten(dy, gate, b)


def gated_add_backward_aten(dy: Tensor, gate: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    _, dgate, db = aten.gated_add_gradients(dy, gate, b, "fp32", (False, True, True))
    return dgate, db


# gate_projected_add


def gate_projected_add_cuda(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return kernels().gate_projected_add.gate_projected_add(x, weight, bias, a, b)


def gate_projected_add_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    if interpreted():
        return gate_projected_add_cuda(x, weight, bias, a, b)
    contract.check_gate_projected_add(x, weight, bias, a, b)
    return aten.gate_projected_add(x, weight, bias, a, b)


def gate_projected_add_fake(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    contract.check_gate_projected_add(x, weight, bias, a, b)
    return a + torch.sigmoid(a.new_empty((*a.shape[:-1], 1))) * b


def gate_projected_add_and_logit_cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    return kernels().gate_projected_add.gate_projected_add_and_logit(x, weight, bias, a, b)


def gate_projected_add_and_logit_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    if interpreted():
        return gate_projected_add_and_logit_cuda(x, weight, bias, a, b)
    contract.check_gate_projected_add(x, weight, bias, a, b)
    return aten.gate_projected_add_and_logit(x, weight, bias, a, b)


def gate_projected_add_and_logit_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    return gate_projected_add_fake(x, weight, bias, a, b), a.new_empty((*a.shape[:-1], 1))


def gate_projected_add_backward_cuda(
    dy: Tensor, x: Tensor | None, weight: Tensor, logit: Tensor, b: Tensor, rows: Sequence[int], need_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernel = kernels().gate_projected_add_backward
    if kernel.fits(dy, x, weight, logit, b):
        return _all_tensors(*kernel.gradients(dy, x, weight, logit, b, rows, need_bias))
    return gate_projected_add_backward_aten(dy, x, weight, logit, b, rows, need_bias)


def gate_projected_add_backward_cpu(
    dy: Tensor, x: Tensor | None, weight: Tensor, logit: Tensor, b: Tensor, rows: Sequence[int], need_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = gate_projected_add_backward_cuda if interpreted() else gate_projected_add_backward_aten
    return run(dy, x, weight, logit, b, rows, need_bias)


def gate_projected_add_backward_aten(
    dy: Tensor, x: Tensor | None, weight: Tensor, logit: Tensor, b: Tensor, rows: Sequence[int], need_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs = True, x is not None, need_bias, False, True
    dx, dweight, dbias, _, db = aten.gate_projected_add_gradients(dy, None, x, weight, logit, b, needs)
    return _all_tensors(dx.reshape(*rows, weight.numel()).contiguous(), dweight, dbias, db)


def _all_tensors(
    dx: Tensor, dweight: Tensor | None, dbias: Tensor | None, db: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An op has no optional results: one that was not asked for is an empty tensor."""
    return dx, dx.new_empty(0) if dweight is None else dweight, dx.new_empty(0) if dbias is None else dbias, db


# moe_combine

COMBINE_TENSORS = 11  # of its arguments, in front of four numbers


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
) -> tuple:
    """The arguments in the order in which the kernel and the expression take them."""
    tensors = (a, b, gate, x, gate_weight, gate_bias, topk_weights, inverse, masked, residual, norm_weight)
    return *tensors, top_k, permuted, eps, offset


def moe_combine_cuda(a: Tensor, b: Tensor, **options) -> tuple[Tensor, Tensor]:
    return kernels().moe_combine.moe_combine(*combine_arguments(a, b, **options))


def moe_combine_cpu(a: Tensor, b: Tensor, **options) -> tuple[Tensor, Tensor]:
    if interpreted():
        return moe_combine_cuda(a, b, **options)
    check_combine(a, b, options)
    return aten_combine.moe_combine_expression(*combine_arguments(a, b, **options))


def moe_combine_fake(a: Tensor, b: Tensor, **options) -> tuple[Tensor, Tensor]:
    check_combine(a, b, options)
    shaped = b if options.get("residual") is None else options["residual"]
    total = b.new_empty(shaped.shape)
    return total, b.new_empty(0) if options.get("eps") is None else b.new_empty(shaped.shape)


def check_combine(a: Tensor, b: Tensor, options: dict) -> None:
    """Raises RuntimeError outside the op's contract."""
    plain = ("top_k", "permuted", "eps", "offset")
    named = {"a": a, "b": b} | {name: value for name, value in options.items() if name not in plain}
    top_k, permuted, eps = (
        options.get(name, other) for name, other in (("top_k", 0), ("permuted", False), ("eps", None))
    )
    contract.check_moe_combine(named, top_k, permuted, eps)
