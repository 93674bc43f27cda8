"""What a site becomes: an op, and what the pass has to know of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, NamedTuple

import torch

from fusionpass.private import OpOverload


class Argument(NamedTuple):
    """One of an op's, by its schema, which takes long to ask."""

    name: str
    of_site: str  # the site's operand or number that it is
    by_keyword: bool
    default: Any


@dataclass(frozen=True)
class Op:
    """An op that a site may become. Its arguments are the site's operands and numbers of the same names.

    An argument `dtype`, where the op has one, is given where the operands do not say what dtype to store; an argument
    `numerics` where the option has another value than the schema. The op returns fresh tensors and writes none.

    Attributes:
        target: the overload, such as `torch.ops.mine.silu_mul.default`.
        names: argument -> the site's operand or number, where the two have other names.
        results: what sentences call its results. A result beyond those that a site has is an empty tensor.
        rows: operands with the result's own rows, which decide its dtype, and whose producers Inductor would fuse with it.
        contiguous: contiguous operands give contiguous results of the shape and dtype that the formula has, so that the op
            need not be asked.
        trains: it has a backward.
        casts: autocast has a say in what it gives.
        opened: Inductor is given its expression in place of the op, on any device.
        opened_on_cpu: the same, on a CPU.
        widened: operands that the expression casts to float32 for a kernel of their own.
        weights: operands that are summed over with another: `verify` draws them so that the sums are around 1.
        summed: operands whose last dim is summed over so.
        indexes: operand of integers -> the operand whose rows they name.
    """

    target: OpOverload
    names: Mapping[str, str] = field(default_factory=dict, hash=False)
    results: tuple[str, ...] = ("result",)
    rows: tuple[str, ...] = ()
    contiguous: bool = False
    trains: bool = False
    casts: bool = False
    opened: bool = False
    opened_on_cpu: bool = False
    widened: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    summed: tuple[str, ...] = ()
    indexes: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.target, OpOverload):
            raise TypeError(
                f"an op of a rule is {self.target!r}: it takes an overload, such as torch.ops.mine.silu_mul.default"
            )

    @cached_property
    def name(self) -> str:
        return self.target.overloadpacket.__name__

    @cached_property
    def several(self) -> bool:
        """Whether it has more than one result, which are then read by `getitem`."""
        return len(self.target._schema.returns) > 1

    @cached_property
    def arguments(self) -> tuple[Argument, ...]:
        return tuple(
            Argument(each.name, self.names.get(each.name, each.name), each.kwarg_only, each.default_value)
            for each in self.target._schema.arguments
        )

    @cached_property
    def stores(self) -> bool:
        """Whether it is told the dtype of what it stores."""
        return any(each.name == "dtype" for each in self.arguments)

    def __reduce__(self) -> tuple:
        """Overloads do not pickle; their names do."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return _op_again, (values.pop("target").name(), values)


def _op_again(name: str, values: dict[str, Any]) -> Op:
    found: Any = torch.ops
    packet, _, overload = name.partition(".")
    for part in (*packet.split("::"), overload or "default"):
        found = getattr(found, part)
    return Op(found, **values)
