"""What is measured: the ops with their inputs and bytes, and the grid of shapes.

T rows of H elements, the gate projected from K = H elements per row. Inputs are drawn from a normal distribution,
weights scaled by 1 / sqrt(K), so that the logits are normal too and sigmoid is not saturated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

import fusionpass.ops  # noqa: F401  registers torch.ops.fusionpass

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENS = (1, 8, 32, 64, 256, 1024, 8192)
HIDDEN = (2048, 4096, 7168)
BACKWARD_FROM = 256  # tokens; decode runs no backward, so the default grid starts it here


class Case(NamedTuple):
    """One op at one shape: [tokens, hidden] of `dtype`, a key of DTYPES."""

    op: str
    tokens: int
    hidden: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.op} {self.tokens} x {self.hidden}"


class Operands(NamedTuple):
    """The inputs of one call; `dy`, shaped as the result, where the call is the backward."""

    inputs: tuple[Tensor, ...]
    dy: Tensor | None

    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.inputs, self.dy) if t is not None)


def _gated_add(a: Tensor, gate: Tensor, b: Tensor) -> Tensor:
    return a + torch.sigmoid(gate) * b


def _gated_add_op(a: Tensor, gate: Tensor, b: Tensor) -> Tensor:
    return torch.ops.fusionpass.gated_add(a, gate, b)


def _gate_projected_add(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    gate = linear(x, weight)
    return a + torch.sigmoid(gate) * b


def _gate_projected_add_op(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.fusionpass.gate_projected_add(x, weight, None, a, b)


TOP_K = 10  # as in Qwen3-Next
EPS = 1e-6


def _combine(x, gate_weight, a, b, residual, norm_weight):
    total = residual + (a + torch.sigmoid(linear(x, gate_weight)) * b)
    wide = total.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return total, norm_weight * normed.to(total.dtype)


def _combine_op(x, gate_weight, a, b, residual, norm_weight):
    options = {"x": x, "gate_weight": gate_weight, "residual": residual, "norm_weight": norm_weight, "eps": EPS}
    return torch.ops.fusionpass.moe_combine(a, b, **options)


def _finalize_combine(x, gate_weight, y, topk_weights, inverse, b, residual, norm_weight):
    a = (y * topk_weights)[inverse].view(-1, TOP_K, y.shape[-1]).sum(1)
    return _combine(x, gate_weight, a, b, residual, norm_weight)


def _finalize_combine_op(x, gate_weight, y, topk_weights, inverse, b, residual, norm_weight):
    options = {"x": x, "gate_weight": gate_weight, "residual": residual, "norm_weight": norm_weight, "eps": EPS}
    routed = {"topk_weights": topk_weights, "inverse": inverse, "top_k": TOP_K, "permuted": True}
    return torch.ops.fusionpass.moe_combine(y, b, **routed, **options)


def _combine_shapes(t: int, h: int) -> dict[str, tuple[int, ...]]:
    return {"x": (t, h), "weight": (1, h), "a": (t, h), "b": (t, h), "residual": (t, h), "norm_weight": (h,)}


def _finalize_combine_shapes(t: int, h: int) -> dict[str, tuple[int, ...]]:
    shapes = {
        "x": (t, h),
        "weight": (1, h),
        "y": (t * TOP_K, h),
        "topk_weights": (t * TOP_K, 1),
        "inverse": (t * TOP_K,),
    }
    return shapes | {"b": (t, h), "residual": (t, h), "norm_weight": (h,)}


def _gated_add_shapes(t: int, h: int) -> dict[str, tuple[int, int]]:
    return {"a": (t, h), "gate": (t, 1), "b": (t, h)}


def _gate_projected_add_shapes(t: int, h: int) -> dict[str, tuple[int, int]]:
    return {"x": (t, h), "weight": (1, h), "a": (t, h), "b": (t, h)}


@dataclass(frozen=True)
class Op:
    """An op of the benchmark.

    Attributes:
        eager: the expression it stands for, on the inputs in order; also what torch.compile is given.
        here: the same through `torch.ops.fusionpass`.
        shapes: the inputs' shapes by name, from (T, H).
        reads, writes: elements that the formula has to move, from (T, H): each input once, each result once.
        backward: the gradients of every input are measured, not the result.
    """

    eager: Callable[..., Any]
    here: Callable[..., Any]
    shapes: Callable[[int, int], dict[str, tuple[int, ...]]]
    reads: Callable[[int, int], int]
    writes: Callable[[int, int], int]
    backward: bool = False


OPS = {
    "gated_add": Op(
        _gated_add,
        _gated_add_op,
        _gated_add_shapes,
        reads=lambda t, h: 2 * t * h + t,  # a, b, gate
        writes=lambda t, h: t * h,
    ),
    "gate_projected_add": Op(
        _gate_projected_add,
        _gate_projected_add_op,
        _gate_projected_add_shapes,
        reads=lambda t, h: 3 * t * h + h,  # x, a, b, weight
        writes=lambda t, h: t * h,
    ),
    "moe_combine": Op(  # gate projection, formula, residual, RMSNorm
        _combine,
        _combine_op,
        _combine_shapes,
        reads=lambda t, h: 4 * t * h + 2 * h,  # x, a, b, residual, weight, norm weight
        writes=lambda t, h: 2 * t * h,  # the sum, the normed sum
    ),
    "moe_combine_top_10": Op(  # the same with the weighted top-10 sum that makes a; the inverse counts 4 elements of 16 bit
        _finalize_combine,
        _finalize_combine_op,
        _finalize_combine_shapes,
        reads=lambda t, h: (3 + TOP_K) * t * h + 2 * h + 5 * TOP_K * t,
        writes=lambda t, h: 2 * t * h,
    ),
    "gated_add_backward": Op(
        _gated_add,
        _gated_add_op,
        _gated_add_shapes,
        reads=lambda t, h: 2 * t * h + t,  # dy, b, gate
        writes=lambda t, h: t * h + t,  # db, dgate; da is dy itself
        backward=True,
    ),
    "gate_projected_add_backward": Op(
        _gate_projected_add,
        _gate_projected_add_op,
        _gate_projected_add_shapes,
        reads=lambda t, h: 3 * t * h + t + h,  # dy, b, x, logit, weight
        writes=lambda t, h: 2 * t * h + h,  # db, dx, dweight; da is dy itself
        backward=True,
    ),
}


def bytes_read(case: Case) -> int:
    """Bytes one call has to read."""
    return OPS[case.op].reads(case.tokens, case.hidden) * DTYPES[case.dtype].itemsize


def bytes_moved(case: Case) -> int:
    """Bytes one call has to read and write, the `traffic` of the kernels' docstrings."""
    return bytes_read(case) + OPS[case.op].writes(case.tokens, case.hidden) * DTYPES[case.dtype].itemsize


def grid(
    ops: Iterable[str] | None = None,
    tokens: Sequence[int] | None = None,
    hidden: Sequence[int] | None = None,
    dtype: str = "bf16",
) -> list[Case]:
    """The cases, op by op, then by H, then by T; None means the default of each."""
    cases = []
    for op in OPS if ops is None else ops:
        rows = tokens or [t for t in TOKENS if not OPS[op].backward or t >= BACKWARD_FROM]
        cases += [Case(op, t, h, dtype) for h in hidden or HIDDEN for t in rows]
    return cases


def draw(case: Case, generator: torch.Generator) -> Operands:
    """Fresh operands on the generator's device; those of a backward require gradients."""
    op = OPS[case.op]
    like = {"dtype": DTYPES[case.dtype], "device": generator.device}
    inputs = []
    for name, shape in op.shapes(case.tokens, case.hidden).items():
        if name == "inverse":
            inputs.append(torch.randperm(*shape, generator=generator, device=generator.device))
            continue
        tensor = torch.randn(shape, generator=generator, **like)
        inputs.append(tensor.div_(case.hidden**0.5) if name == "weight" else tensor)
    if not op.backward:
        return Operands(tuple(inputs), None)
    dy = torch.randn((case.tokens, case.hidden), generator=generator, **like)
    return Operands(tuple(tensor.requires_grad_() for tensor in inputs), dy)
