"""The ops under autocast: what the nodes that they stand for do there.

    gated_add            its nodes promote, as the op does
    gate_projected_add   `linear` computes in autocast's dtype: x, weight and bias are cast to it
    moe_combine          the same. Where no `dtype` was given, the graph was traced without autocast, and the dtypes of its
                         results are what autocast makes of each node in turn: so the nodes themselves are computed

Below these kernels autocast is off, so that the ops' own arithmetic is not rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusionpass import implementations, library
from fusionpass.kernels import aten_combine
from fusionpass.private import _DisableAutocast

DEVICES = ("CPU", "CUDA", "XPU", "MPS", "HPU", "PrivateUse1")


def _cast(tensor: Tensor | None) -> Tensor | None:
    """To autocast's dtype what autocast casts: floating-point tensors but those in float64."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def gated_add(
    a: Tensor, gate: Tensor, b: Tensor, *, numerics: str = "fp32", dtype: torch.dtype | None = None
) -> Tensor:
    if numerics == "eager" and dtype is None and not a.dtype == gate.dtype == b.dtype:
        # Autocast came between the tracing and this call. The op rounds to one dtype; the nodes to one each.
        return aten_combine.gated_nodes(a, gate, b)
    with _DisableAutocast():
        return library.gated_add(a, gate, b, numerics=numerics, dtype=dtype)


def gate_projected_add(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *, dtype: torch.dtype | None = None
) -> Tensor:
    if weight.dim() > 1 or a.device.type != "cpu" or x.dtype != weight.dtype:  # a CPU's autocast leaves `mv` as it is
        x, weight, bias = map(_cast, (x, weight, bias))
    with _DisableAutocast():
        return library.gate_projected_add(x, weight, bias, a, b, dtype=dtype)


def moe_combine(a: Tensor, b: Tensor, **options) -> tuple[Tensor, Tensor]:
    if options.get("dtype") is None:
        implementations.check_combine(a, b, options)
        nodes = {
            "projected": aten_combine.projected_nodes,
            "gated": aten_combine.gated_nodes,
            "norm": aten_combine.norm_nodes,
        }
        return aten_combine.moe_combine_steps(*implementations.combine_arguments(a, b, **options), **nodes)
    options |= {name: _cast(options.get(name)) for name in ("x", "gate_weight", "gate_bias")}
    with _DisableAutocast():
        return library.moe_combine(a, b, **options)


def _off(op):
    """The op with autocast off: for those that compute what another op's kernel here, or autograd, calls them for."""

    def call(*args, **kwargs):
        with _DisableAutocast():
            return op(*args, **kwargs)

    return call


KERNELS = {
    "gated_add": gated_add,
    "gate_projected_add": gate_projected_add,
    "moe_combine": moe_combine,
    "_gated_add_out": _off(library.gated_add_out),
    "_gated_add_backward": _off(library.gated_add_backward),
    "_gate_projected_add_and_logit": _off(library.gate_projected_add_and_logit),
    "_gate_projected_add_backward": _off(library.gate_projected_add_backward),
}


def register() -> None:
    for name, kernel in KERNELS.items():
        for device in DEVICES:
            library.LIBRARY.impl(name, kernel, f"Autocast{device}")
