"""Translation validation: the op and the nodes it replaces, run side by side on random inputs (option `verify`).

A mistake of the matcher shows as another value. The inputs of the nodes are random, with the shapes, dtypes and strides that
the tracer recorded. They come from a normal distribution, from one so narrow that a norm's eps matters, and from one with
infinities, nan and zeros among the values. The results may differ only by rounding.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fusionpass.errors import VerificationFailed
from fusionpass.graph.identity import inner_name
from fusionpass.graph.provenance import module_of, source_of
from fusionpass.graph.tensors import same_strides, tensor_of, value_of
from fusionpass.operators.implementations import interpreted
from fusionpass.private import unset_fake_temporarily
from fusionpass.rules.replace import Inserted
from fusionpass.rules.site import Site

log = logging.getLogger(__name__)
SEED = 0
RARE = (math.nan, math.inf, -math.inf, 0.0, -0.0)
SIGMAS = 4
_KINDS = ("cpu", "cuda")  # the kinds of devices that have autocast
SMALL = 2.0**-9  # its square has the order of eps, 1e-6 to 1e-5


def validate(gm: GraphModule, site: Site, new: Inserted) -> bool:
    """Compare the site's nodes with the op that stands before them.

    Returns:
        Whether they were compared. If they cannot be, a warning in the log says why.

    Raises:
        VerificationFailed: they differ in dtype, shape, strides, or by more than `allowed`.
    """
    old, found = site.results, list(new.results)
    # A value that the site computes itself is computed on both sides: in a + s * s, b is the sigmoid.
    operands = [node.args[0] if node in new.views else node for node in new.op.all_input_nodes]
    operands = [node for node in operands if node not in site.parts]
    inside, leaves = _region(old, operands)
    if any(tensor_of(node) is not None and _size_of(tensor_of(node)) is None for node in (*old, *leaves)):
        return _not_compared(site, "its sizes are not known before it runs")
    before = _extracted(gm, inside, leaves, old)
    after = _extracted(gm, [new.op, *[node for node in found if node is not new.op]], leaves, found)
    with unset_fake_temporarily(), torch.no_grad(), ExitStack() as traced:
        exact = site.numbers["numerics"] == "eager" and not interpreted()  # the interpreter's exp is numpy's
        way = "option 'rules', or do not use the pass for this model"
        generator = torch.Generator().manual_seed(SEED)  # our own, so the user's random stream does not change
        shown = [node for node in inside if tensor_of(node) is not None]
        probe = _extracted(gm, inside, leaves, shown)
        drawn = [_drawn(node, site, generator, 1.0, False) for node in leaves]
        if not _as_traced(lambda: probe(*map(_copied, drawn)), shown, traced):
            return _not_compared(site, "its nodes give other dtypes here than when they were traced")
        generator.manual_seed(SEED)
        for size, rare in ((1.0, False), (SMALL, False), (1.0, True)):
            inputs = [_drawn(node, site, generator, size, rare) for node in leaves]
            want, got = before(*map(_copied, inputs)), after(*map(_copied, inputs))
            for name, w, g in zip(site.op.results, want, got, strict=False):
                complaint = _difference(g, w, 0.0 if exact else _allowed(site, w.dtype), size)
                if complaint is not None:
                    raise VerificationFailed(
                        f"{_named(site)}: the {name} {complaint}. Please report it; leave it out by {way}"
                    )
    return True


def _not_compared(site: Site, reason: str) -> bool:
    log.warning("%s: not verified, for %s", _named(site), reason)
    return False


def _as_traced(run: Callable[[], Sequence[Tensor]], shown: Sequence[Node], traced: ExitStack) -> bool:
    """Enter the autocast state in which the nodes give the recorded dtypes; False if there is none.

    This is the state to which the graph itself switches before the nodes, or else the caller's own. If the casts of a
    graph are nodes, it runs without autocast, whatever the caller's state is.
    """
    recorded = [tensor_of(node).dtype for node in shown]
    for states in (_autocast_of(shown[-1]), [torch.autocast(kind, enabled=False) for kind in _KINDS]):
        with ExitStack() as tried:
            for state in states:
                tried.enter_context(state)
            same = [result.dtype for result in run()] == recorded
        if same:
            for state in states:
                traced.enter_context(state)
            return True
    return False


def _autocast_of(node: Node) -> list[torch.autocast]:
    """The autocast regions of the graph that the node stands in, outermost first."""
    open_regions: dict[Node, None] = {}
    for each in node.graph.nodes:
        if each is node:
            break
        name = inner_name(each.target) if each.op == "call_function" else ""
        if name == "_enter_autocast":
            open_regions[each] = None
        elif name == "_exit_autocast":
            open_regions.pop(each.args[0], None)
    return [torch.autocast(*region.args) for region in open_regions]


def _named(site: Site) -> str:
    place = ", ".join(part for part in (source_of(site.anchor), module_of(site.anchor)) if part)
    return f"verify: site {site.anchor}{f' ({place})' if place else ''}, stages {', '.join(site.stages)}"


def _region(results: Sequence[Node], operands: Sequence[Node]) -> tuple[list[Node], list[Node]]:
    """The nodes between the op's operands and the results, in graph order, and the nodes that they read from elsewhere."""
    stop = {node for node in operands if node.op != "get_attr" or tensor_of(node) is not None}
    inside: set[Node] = set()
    leaves: dict[Node, None] = dict.fromkeys(node for node in operands if node in stop)
    pending = list(results)
    while pending:
        node = pending.pop()
        if node in inside:
            continue
        value = value_of(node)
        number = value is not None and not isinstance(value, Tensor | list | tuple)
        if node in stop or node.op == "placeholder" or number:
            leaves[node] = None
            continue
        inside.add(node)
        pending += node.all_input_nodes
    ordered = [node for node in results[0].graph.nodes if node in inside]
    return ordered, list(leaves)


def _extracted(gm: GraphModule, nodes: Sequence[Node], leaves: Sequence[Node], results: Sequence[Node]) -> GraphModule:
    """A function that computes the results from the values of the leaves. It shares the modules of `gm`."""
    graph = Graph()
    copies = {leaf: graph.placeholder(f"leaf_{i}") for i, leaf in enumerate(leaves)}

    def copied(node: Node) -> Node:
        if node not in copies:
            copies[node] = graph.node_copy(node, copied)
        return copies[node]

    for node in nodes:
        copied(node)
    graph.output(tuple(copies[node] for node in results))
    return GraphModule(gm, graph)


def _size_of(tensor: Tensor) -> list[int] | None:
    """The shape in numbers; None if some size or stride is not known."""
    sizes = [_number(size) for size in (*tensor.shape, *tensor.stride())]
    return None if None in sizes else sizes[: tensor.dim()]


def _number(size: Any) -> Any:
    """The value that a symbolic number had at the tracing; None if it had none."""
    if isinstance(size, int | float | bool):
        return size
    return size.node.hint if size.node.has_hint() else None


def _drawn(node: Node, site: Site, generator: torch.Generator, size: float, rare: bool) -> Any:
    """A random value for an input of the region, with the recorded layout. Weights are drawn so that sums are around 1."""
    recorded = value_of(node)
    if not isinstance(recorded, Tensor):
        return _number(recorded) if isinstance(recorded, torch.SymInt | torch.SymFloat | torch.SymBool) else recorded
    shape = _size_of(recorded)
    strides = [_number(stride) for stride in recorded.stride()]
    reach = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if 0 not in shape else 0
    if recorded.dtype is torch.bool:
        flat = torch.rand(reach, generator=generator) < 0.25
    elif recorded.dtype.is_floating_point:
        flat = torch.randn(reach, generator=generator) * size
        if node in map(site.node, site.op.weights):
            flat /= math.sqrt(recorded.numel())
        if rare:  # in about every second row
            odd = torch.tensor(RARE)[torch.randint(len(RARE), (reach,), generator=generator)]
            flat = torch.where(torch.rand(reach, generator=generator) * shape[-1] < 0.5, odd, flat)
    else:  # an index of the rows that the op gathers
        flat = torch.randint(_rows(site), (reach,), generator=generator)
    device = "cpu" if recorded.device.type == "meta" else recorded.device
    return flat.to(device=device, dtype=recorded.dtype).as_strided(shape, strides)


def _rows(site: Site) -> int:
    """How many rows an index may name: the rows of the operands that the op gathers from, at least one."""
    gathered = [site.node(source) for index, source in site.op.indexes.items() if index in site.operands]
    return max([1, *(math.prod(_size_of(tensor_of(node))[:-1]) for node in gathered if node is not None)])


def _copied(value: Any) -> Any:
    """A copy with the same layout, for a side that may write into it."""
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage().clone()
    return torch.empty(0, dtype=value.dtype, device=value.device).set_(storage, 0, value.shape, value.stride())


def _allowed(site: Site, dtype: torch.dtype) -> float:
    """How far two ways to compute the site may lie apart, in units of the largest number of a row.

    Each node, and each term of the weighted sum, rounds by at most half of epsilon. Many roundings add up like a random
    walk. The projection sums its products in float32, in an order of its own.
    """
    recorded = (tensor_of(part) for part in site.parts)  # a part may be narrower than the result, or wider
    dtypes = {dtype, *(value.dtype for value in recorded if value is not None and value.is_floating_point())}
    coarsest = max(torch.finfo(each).eps for each in dtypes)
    terms = len(site.parts) + site.numbers.get("top_k", 0)
    summed = (site.node(name) for name in site.op.summed if name in site.operands)
    products = max([1, *(_number(tensor_of(node).shape[-1]) for node in summed)])
    return SIGMAS * (math.sqrt(terms) * coarsest / 2 + math.sqrt(products) * torch.finfo(torch.float32).eps)


def _difference(got: Tensor, want: Tensor, allowed: float, size: float) -> str | None:
    """How the op's result differs from the nodes' by more than rounding, for inputs of about `size`."""
    if (got.dtype, got.shape) != (want.dtype, want.shape):
        return f"is {got.dtype}{list(got.shape)}, the nodes give {want.dtype}{list(want.shape)}"
    if not same_strides(got, want):
        return f"has strides {tuple(got.stride())}, the nodes give {tuple(want.stride())}"
    if want.numel() == 0:
        return None
    got, want = got.double(), want.double()
    finite = want.isfinite()
    same = torch.where(finite, got.isfinite(), (got == want) | (got.isnan() & want.isnan()))
    if not same.all():
        at = _first(~same)
        return f"is {got[at]} at {list(at)}, the nodes give {want[at]}"
    error = torch.where(finite, got - want, 0.0).abs()
    largest = torch.where(finite, want, 0.0).abs().amax(-1, keepdim=True).clamp(min=size)
    over = error > allowed * largest
    if not over.any():
        return None
    at = _first(over)
    bound = float((allowed * largest).expand_as(error)[at])
    found = f"is {got[at]:.6g} at {list(at)}, the nodes give {want[at]:.6g}"
    return f"{found}, which is {error[at]:.2g} apart, allowed {bound:.2g}"


def _first(found: Tensor) -> tuple[int, ...]:
    return tuple(found.nonzero()[0].tolist())
