"""What a site becomes: an op, and what the pass must know about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, NamedTuple

import torch

from fusionpass.private import OpOverload


class Argument(NamedTuple):
    """One argument of an op, read from its schema once, because that takes long."""

    name: str
    of_site: str  # the name of the site's operand or number for it
    by_keyword: bool
    default: Any


@dataclass(frozen=True)
class Op:
    """An op that a site may become. Its arguments are the site's operands and numbers of the same names.

    If the op has an argument `dtype`, it is given where the operands do not say which dtype to store. If it has an argument
    `numerics`, it is given where the option differs from the schema's default. The op returns fresh tensors and writes none.

    Attributes:
        target: the overload, such as `torch.ops.mine.silu_mul.default`.
        names: argument -> the site's operand or number, if that has another name.
        results: the names of its results in sentences. A result that a site does not have is an empty tensor.
        rows: operands with the same rows as the result. They decide its dtype, and Inductor would fuse their producers
            with it.
        shaped: operands, of which the first that a site has gives the results their shape; if it has none of them, they
            have that of the core's result. Empty: stages take care of it themselves.
        contiguous: contiguous operands give contiguous results with the shape and dtype of the formula, so the op need
            not be asked.
        trains: it has a backward.
        casts: autocast may change the dtype of its result.
        opened: Inductor gets the op's expression in place of the op, on any device.
        opened_on_cpu: the same, on a CPU only.
        widened: operands that the expression casts to float32 in a kernel of their own.
        weights: operands whose products with others are summed. `verify` draws them so that the sums are around 1.
        summed: operands whose last dim is summed over in this way.
        indexes: operand of integers -> the operand whose rows they name.
    """

    target: OpOverload
    names: Mapping[str, str] = field(default_factory=dict, hash=False)
    results: tuple[str, ...] = ("result",)
    rows: tuple[str, ...] = ()
    shaped: tuple[str, ...] = ()
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
        """Whether it has more than one result. Then `getitem` reads them."""
        return len(self.target._schema.returns) > 1

    @cached_property
    def arguments(self) -> tuple[Argument, ...]:
        return tuple(
            Argument(each.name, self.names.get(each.name, each.name), each.kwarg_only, each.default_value)
            for each in self.target._schema.arguments
        )

    @cached_property
    def stores(self) -> bool:
        """Whether it has an argument for the dtype that it stores."""
        return any(each.name == "dtype" for each in self.arguments)

    def __reduce__(self) -> tuple:
        """Pickle the name of the overload: overloads themselves cannot be pickled."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return _op_again, (values.pop("target").name(), values)


def _op_again(name: str, values: dict[str, Any]) -> Op:
    found: Any = torch.ops
    packet, _, overload = name.partition(".")
    for part in (*packet.split("::"), overload or "default"):
        found = getattr(found, part)
    return Op(found, **values)
