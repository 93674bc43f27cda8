"""How a site's op is called: which arguments are operands of the site, which are numbers, and what dtype it stores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fusionpass.graph.tensors import tensor_of, under_autocast
from fusionpass.rules.site import Operand, Site


def call_of(site: Site, operand: Callable[[str, Operand], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the op by position, and those by keyword. `operand` gives the value for one of the site's operands.

    An argument that the site does not have is left out, or is None if it goes by position.
    """
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in site.op.arguments:
        name = argument.of_site
        if name in site.operands:
            value = operand(name, site.operands[name])
        elif name == "dtype":
            value = stored(site)
        else:
            value = site.numbers.get(name)
            if name == "numerics" and value == argument.default:
                value = None
        if not argument.by_keyword:
            args.append(value)
        elif value is not None and value is not False:
            kwargs[argument.name] = value
    return tuple(args), kwargs


def stored(site: Site) -> torch.dtype | None:
    """The dtype to store, if the operands do not determine it: their dtypes differ, or autocast changes the result's."""
    rows = [site.operands.get(name) or site.core.get(name) for name in site.op.rows]
    read = (tensor_of(operand.value) for operand in rows if operand is not None)
    total = tensor_of(site.end)
    if len({total.dtype, *(tensor.dtype for tensor in read)}) > 1:
        return total.dtype
    if site.op.casts:
        enter = torch.amp.autocast_mode._enter_autocast
        regions = site.anchor.graph.find_nodes(op="call_function", target=enter, sort=False)
        if regions or under_autocast(total.device):
            return total.dtype
    return None
