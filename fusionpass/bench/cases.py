"""What is measured: the cases that the ops declare, with fresh inputs, and the grid of shapes.

T rows of H elements. The gate is projected from K = H elements per row. Inputs are drawn from a normal distribution.
Weights are scaled by 1 / sqrt(K), so that the logits are normal too and the sigmoid is not saturated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusionpass import operators

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
    """The inputs of one call. If the call is the backward, `dy` has the shape of the result."""

    inputs: tuple[Tensor, ...]
    dy: Tensor | None

    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.inputs, self.dy) if t is not None)


# Backwards come last.
OPS = dict(sorted((case for op in operators.OPS for case in op.bench.items()), key=lambda case: case[1].backward))


def bytes_read(case: Case) -> int:
    """Bytes that one call has to read."""
    return OPS[case.op].reads(case.tokens, case.hidden) * DTYPES[case.dtype].itemsize


def bytes_moved(case: Case) -> int:
    """Bytes that one call has to read and write: the `traffic` in the kernels' docstrings."""
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
