"""What an op is: what PyTorch is told about it, and what this package knows about it, in one value.

Ops are registered by `Library.define` and `impl`, not `custom_op`: a call costs the CPU half as much (`bench/measured.md`).
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusionpass.operators import in_inductor
from fusionpass.operators.autocast import DEVICES, passed_by

LIBRARY = torch.library.Library("fusionpass", "FRAGMENT")


@dataclass(frozen=True)
class Bench:
    """A case of the benchmark: [T, H] of an op, forward or backward.

    Attributes:
        eager: the expression for which the op stands, on the inputs in order. torch.compile gets it too.
        here: the same through `torch.ops.fusionpass`.
        shapes: the inputs' shapes by name, from (T, H).
        reads, writes: elements that the formula has to move, from (T, H): each input once, each result once.
        backward: the gradients of every input are measured, not the result.
        beside: other expressions, by the name of their side, that show what a kernel can reach. They compute something else,
            so each is checked against itself.
        found: the pass finds the expression by itself, so that the CPU time of a rewritten graph can be measured.
    """

    eager: Callable[..., Any]
    here: Callable[..., Any]
    shapes: Callable[[int, int], dict[str, tuple[int, ...]]]
    reads: Callable[[int, int], int]
    writes: Callable[[int, int], int]
    backward: bool = False
    beside: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    found: bool = True


@dataclass(eq=False)
class Op:
    """An op of `torch.ops.fusionpass`. Every function takes the arguments of the schema.

    Attributes:
        schema: the op's name, arguments and results.
        run: computes it on tensors of any device, by our kernel or in ATen.
        fake: makes results of the right shapes, strides and dtypes for a tracer.
        autograd: the Autograd kernel, which takes the dispatcher's key set first; None if nobody differentiates the op.
        autocast: what it does under autocast; None means the op itself with autocast off.
        inductor: what Inductor's trace finds in its place; None means the op. See `fusionpass.operators.in_inductor`.
        launches: the Triton kernels that `inductor` launches.
        direct: the op as a plain function, for graphs that Python runs; see `fusionpass.operators.functions`.
        bench: its cases in the benchmark, by name.
        overload: what the dispatcher calls, from `register` on.
    """

    schema: str
    run: Callable[..., Any]
    fake: Callable[..., Any]
    autograd: Callable[..., Any] | None = None
    autocast: Callable[..., Any] | None = None
    inductor: Callable[..., Any] | None = None
    launches: Callable[[], list] | None = None
    direct: Callable[..., Any] | None = None
    bench: Mapping[str, Bench] = field(default_factory=dict)
    overload: Any = None

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]


def register(op: Op) -> None:
    """Tell PyTorch about the op."""
    LIBRARY.define(op.schema, tags=(torch.Tag.pt2_compliant_tag,))  # opcheck in the tests checks this
    op.overload = getattr(torch.ops.fusionpass, op.name).default
    LIBRARY.impl(op.name, op.run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusionpass::{op.name}", op.fake, lib=LIBRARY)
    if op.autograd is not None:
        LIBRARY.impl(op.name, op.autograd, "Autograd", with_keyset=True)
    for device in DEVICES:
        LIBRARY.impl(op.name, op.autocast or passed_by(op.overload), f"Autocast{device}")
    if op.inductor is not None:
        in_inductor.register(op.overload, op.inductor, op.launches, LIBRARY)


TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "int",
    bool: "bool",
    float: "float",
    float | None: "float?",
    torch.dtype | None: "ScalarType?",
}


def schema_of(arguments: type[tuple], positional: Sequence[str]) -> str:
    """The part of a schema in brackets, for arguments declared as a NamedTuple. Those not in `positional` go by keyword."""
    written = []
    for name, kind in typing.get_type_hints(arguments).items():
        default = f"={arguments._field_defaults[name]}" if name in arguments._field_defaults else ""
        written.append(f"{TYPES[kind]} {name}{default}")
    return ", ".join([*written[: len(positional)], "*", *written[len(positional) :]])
