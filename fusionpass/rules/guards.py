"""When a formula may not be replaced. Each guard asks one question about a site, and answers with a refusal or None.

A rule lists its guards, cheapest first. The first refusal is reported. Any rule can use the guards here; every rule
needs those in `GUARDS`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cache

import torch
from torch.fx import Node

from fusionpass.graph.effects import Effects, fills_its_memory
from fusionpass.graph.nodes import readers
from fusionpass.graph.refusal import Refusal
from fusionpass.graph.tensors import PLAIN_TYPES, attribute, tensor_of, value_of
from fusionpass.rules.same_results import same_result
from fusionpass.rules.site import Site

CODES = {
    "no-metadata": "the tracer recorded no tensor for an operand",
    "scalar-operand": "an operand is a Python number",
    "multi-use": "a node in between is read by others too, so it must stay",
    "device": "the operands live on different devices, or on one for which there is no kernel",
    "layout": "a tensor that is not strided, such as a sparse one",
    "subclass": "a tensor subclass, whose own rules would be bypassed",
    "zero-dim": "a 0-d operand, which promotes by other rules",
    "in-place": "a node of the formula overwrites memory that somebody else reads",
    "in-place-visible": "the result is written into memory that somebody else reads",
    "functorch": "inside vmap, grad or jvp of torch.func, where the op has no rule",
    "state-change-between": "grad mode, autocast or the stream changes between the reads and the result",
    "mutation-between": "an operand is overwritten between the old read and the new one",
    "metadata-mutation": "an operand's shape or strides are changed in place",
    "needs-grad": "gradients are recorded, and the op has no backward",
    "numerics-eager": "the option 'numerics' asks for the bits of the nodes, and the op rounds differently",
    "result": "the op's result would differ in shape, dtype or device",
    "stride": "the op's result would have another layout in memory than eager's",
    "kept-module": "a module whose call signature the exported program keeps would lose a value, or read another",
    "left-to-inner": "the inner compiler by itself would be faster (option profitable_only)",
}


def operands(site: Site) -> Iterator[tuple[str, Node]]:
    """The operands that are values of the graph, by their names in sentences."""
    for name, operand in site.operands.items():
        if not isinstance(operand.value, str):
            yield operand.said or name, operand.value


def tensors(site: Site) -> Iterator[tuple[str, Node | str, torch.Tensor]]:
    """The tensors of all operands, also of parameters that have only a path."""
    for name, operand in site.operands.items():
        path = isinstance(operand.value, str)
        value = attribute(site.anchor.graph.owning_module, operand.value) if path else tensor_of(operand.value)
        yield operand.said or name, operand.value, value


def results(site: Site) -> Iterator[tuple[str, Node]]:
    for name, node in zip(site.op.results, site.results, strict=False):
        yield f"the {name}", node


def recorded(site: Site, effects: Effects) -> Refusal | None:
    for name, node in (*operands(site), *results(site)):
        if tensor_of(node) is None:
            value = value_of(node) if isinstance(node, Node) else node
            if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
                return Refusal("scalar-operand", "{} of {} is the number {}, not a tensor", name, site.anchor, node)
            return Refusal("no-metadata", "{} ({}) has no recorded tensor", name, node)
    return None


def parts_read_once(site: Site, effects: Effects) -> Refusal | None:
    """A node whose value the op does not give may be read only by nodes that the op replaces."""
    inside = set(site.parts)
    for part in site.parts:
        if part not in site.results and not inside.issuperset(readers(part)):
            names = ", ".join(sorted(reader.name for reader in readers(part)))
            return Refusal("multi-use", "{} has {} users ({})", part, len(readers(part)), names)
    return None


def plain_tensors(site: Site, effects: Effects) -> Refusal | None:
    devices = {}
    for name, node, tensor in tensors(site):
        if type(tensor) not in PLAIN_TYPES:
            return Refusal("subclass", "{} ({}) is a {}", name, node, type(tensor).__name__)
        if tensor.layout is not torch.strided:
            return Refusal("layout", "{} ({}) is {}", name, node, tensor.layout)
        if tensor.dim() == 0:
            return Refusal("zero-dim", "{} ({}) has no dimension", name, node)
        devices[tensor.device] = f"{name} on {tensor.device}"
    if len(devices) > 1:
        return Refusal("device", "{}", ", ".join(devices.values()))
    return None


@cache
def _missing_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """Why there is no kernel for the tensors of a device; "" if there is one."""
    if device.type not in ("cpu", "cuda", "meta"):
        return f"there is no kernel for device {device.type}"
    if device.type != "cuda":
        return ""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed, and kernels for CUDA need it"
    # A graph for a GPU may be traced on a machine without one.
    if dtype is torch.bfloat16 and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has no bfloat16 arithmetic"
    return ""


def device_has_kernels(site: Site, effects: Effects) -> Refusal | None:
    """For this package's own ops."""
    for name, node, tensor in tensors(site):
        problem = _missing_kernel(tensor.device, tensor.dtype)
        if problem:
            return Refusal("device", "{} ({}) is on {}: {}", name, node, tensor.device, problem)
    return None


def first_part(site: Site, effects: Effects) -> Node:
    return min(site.parts, key=effects.position.__getitem__)


def outside_functorch(site: Site, effects: Effects) -> Refusal | None:
    if effects.has_levels and effects.inside_functorch(first_part(site, effects), site.at):
        return Refusal("functorch", "{} stands inside a level of torch.func", site.anchor)
    return None


def one_state(site: Site, effects: Effects) -> Refusal | None:
    first = first_part(site, effects)
    change = effects.state_change_between(first, site.at)
    if change is not None:
        return Refusal("state-change-between", "{} runs between {} and {}", change, first, site.at)
    return None


def nothing_else_written(site: Site, effects: Effects) -> Refusal | None:
    """A node that writes may go only if the rule knows of the write. The two guards below then ask who sees it."""
    for part in site.parts:
        known = part in site.in_place or (part is site.anchor and site.overwrites is not None)
        if effects.writes(part) and not known:
            return Refusal("in-place", "{} may write into memory that others read", part)
    return None


def sum_owned(site: Site, effects: Effects) -> Refusal | None:
    """`a += ...` may become a fresh sum only if nobody can see the difference: a is the graph's own, fills its memory and is
    not read afterwards.

    A view of a larger buffer shows what lies around it (`as_strided`, `untyped_storage`), also to the graph's caller.
    """
    if site.overwrites is None:
        return None
    if not fills_its_memory(site.anchor):
        return Refusal(
            "in-place-visible", "{} writes into {}, which is part of a larger buffer", site.anchor, site.overwrites
        )
    reader = effects.other_reader(site.overwrites, site.anchor)
    if reader is not None:
        text = "{} writes into {}, which {} shows or reads"
        return Refusal("in-place-visible", text, site.anchor, site.overwrites, reader)
    return None


def factors_owned(site: Site, effects: Effects) -> Refusal | None:
    """`b *= sigmoid(g)` and `g.sigmoid_()` may go only if nobody can see the difference, as with `a += ...`."""
    for node, written in site.in_place.items():
        reader = effects.other_reader(written, node)
        if reader is not None:
            return Refusal("in-place", "{} writes into {}, which {} shows or reads", node, written, reader)
        if len(readers(node)) != 1:
            return Refusal("in-place", "{} writes into {} and has {} users", node, written, len(readers(node)))
        memory = effects.storages(written)
        for name, operand in operands(site):  # h.sigmoid_(); a + h * h
            if operand is not written and not effects.storages(operand).isdisjoint(memory):
                return Refusal("in-place", "{} writes into {}, which is {} ({}) too", node, written, name, operand)
    return None


def operands_unwritten(site: Site, effects: Effects) -> Refusal | None:
    for name, operand in site.operands.items():
        writer = effects.write_between(operand.value, operand.read, site.at)
        if writer is not None:
            text = "{} may write {} ({}) before {}"
            return Refusal("mutation-between", text, writer, operand.said or name, operand.value, site.at)
    for name, node in (*operands(site), *results(site)):
        writer = effects.reshaped_by(node)
        if writer is not None:
            return Refusal("metadata-mutation", "{} changes the shape of {} ({}) in place", writer, name, node)
    return None


def gradients_kept(site: Site, effects: Effects) -> Refusal | None:
    """An op without a backward must not stand where gradients are recorded."""
    if site.op.trains or not torch.is_grad_enabled():
        return None
    for name, node, tensor in tensors(site):
        if tensor.requires_grad:
            text = "{} ({}) requires gradients, and {} has no backward: run under torch.no_grad() to let it join"
            return Refusal("needs-grad", text, name, node, site.op.name)
    return None


def same_result_as_eager(site: Site, effects: Effects) -> Refusal | None:
    return same_result(site)


GUARDS = (
    recorded,
    parts_read_once,
    plain_tensors,
    outside_functorch,
    one_state,
    nothing_else_written,
    sum_owned,
    factors_owned,
    operands_unwritten,
    gradients_kept,
    same_result_as_eager,
)
