"""The sides of a case: eager, compiled, this project's op; and the check that each one's result is right.

eager     the expression as written
compile   torch.compile(expression, dynamic=False, fullgraph=True)
tuned     the same with coordinate_descent_tuning
add       gated_add only: one torch.add(a, b), the same bytes without the gate. It shows what a kernel can reach. An op
          declares such a side as `beside` of its case
here      torch.ops.fusionpass
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusionpass.bench.cases import OPS, Case, Operands

Call = Callable[[], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Side:
    """A way to compute a case: `function` of the inputs, and the `expression` that gives its right result in float64."""

    name: str
    function: Callable[..., Tensor]
    expression: Callable[..., Tensor]


def sides_of(op_name: str, *, tuned: bool) -> list[Side]:
    """The sides of an op, eager first. Code that torch.compile made for an earlier case is not used again."""
    op = OPS[op_name]
    fixed = {"dynamic": False, "fullgraph": True}
    functions = {"eager": op.eager, "compile": torch.compile(op.eager, **fixed)}
    if tuned:
        functions["tuned"] = torch.compile(op.eager, options={"coordinate_descent_tuning": True}, **fixed)
    sides = [Side(name, function, op.eager) for name, function in functions.items()]
    sides += [Side(name, function, function) for name, function in op.beside.items()]
    return [*sides, Side("here", op.here, op.eager)]


def calls_of(function: Callable[..., Tensor], sets: Sequence[Operands]) -> list[Call]:
    """One call per set of operands. For a backward, the forward has run already, and the call may be repeated.

    Autograd runs a backward on the stream of its forward. So call this on the stream that will be captured.
    """
    calls: list[Call] = []
    for inputs, dy in sets:
        if dy is None:
            calls.append(functools.partial(function, *inputs))
        else:
            y = function(*inputs)
            calls.append(functools.partial(torch.autograd.grad, y, inputs, dy, retain_graph=True))
    return calls


def truth(expression: Callable[..., Tensor], operands: Operands) -> tuple[Tensor, ...]:
    """What a call on `operands` returns, in float64."""
    inputs = tuple(
        t.detach().double().requires_grad_(operands.dy is not None) if t.is_floating_point() else t
        for t in operands.inputs
    )
    dy = None if operands.dy is None else operands.dy.double()
    return as_tuple(calls_of(expression, [Operands(inputs, dy)])[0]())


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def errors(outputs: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Relative error of each output in the Frobenius norm; nan if an element is nan."""
    return [
        float((out.double() - right).norm() / right.norm().clamp_min(torch.finfo(torch.float64).tiny))
        for out, right in zip(outputs, exact, strict=True)
    ]


def ensure_right(
    case: Case, side: Side, found: Sequence[float], eager: Sequence[float], outputs: Sequence[Tensor]
) -> None:
    """Check that each output's error is at most four times eager's.

    Eager's error on n elements is itself a sample. On one element it may be zero by chance. So an ulp over sqrt(n) is
    allowed in addition.

    Raises:
        RuntimeError: the side computes something else, so its time would mean nothing.
    """
    for index, (error, reference, output) in enumerate(zip(found, eager, outputs, strict=True)):
        allowed = 4 * reference + torch.finfo(output.dtype).eps / max(output.numel(), 1) ** 0.5
        if not error <= allowed:  # nan is wrong as well
            which = f"output {index}" if len(outputs) > 1 else "the output"
            raise RuntimeError(
                f"{case}, side {side.name}: {which} has a relative error of {error:.2g} against float64, allowed "
                f"{allowed:.2g} (eager {reference:.2g}), so its time would mean nothing"
            )
