"""When the formula may not be replaced: each guard is one question about a site, answered by a refusal or None.

They run in the order of `GUARDS`, cheapest first; the first refusal is the one reported.
"""

from __future__ import annotations

import importlib.util
from functools import cache, reduce

import torch

from fusionpass.effects import Effects, fills_its_memory
from fusionpass.kernels.contract import DTYPES
from fusionpass.match import Refusal, Site
from fusionpass.nodes import readers
from fusionpass.options import Options
from fusionpass.tensors import (
    PLAIN_TYPES,
    broadcasts_to,
    dtype_text,
    same_sizes,
    shape_text,
    tensor_of,
    value_of,
)
from fusionpass.verify import same_result

CODES = {
    "view-between": "a view between the sigmoid, the product and the sum reorders or drops rows, or is not known not to",
    "dropout-between": "a dropout in training stands between the product and the sum",
    "other-form": "one node computes the product or the sum as part of something else: glu, lerp, einsum, index_add",
    "cast-between": "a cast rounds in between",
    "scaled": "a factor, alpha or value other than 1 makes it another formula",
    "odd-call": "the call has arguments the formula does not have",
    "out-argument": "the result is written into a given tensor",
    "module-hook": "a module of the formula has hooks",
    "module-forward": "a module of the formula runs a forward that is not torch's own",
    "scalar-operand": "a, b or the gate is a Python number",
    "no-metadata": "the tracer recorded no tensor for an operand",
    "multi-use": "the product is read by others too, so it must stay",
    "mixed-dtype": "the operands differ in dtype, and one is 0-d or no dtype of the op, or numerics is 'eager'",
    "dtype": "a dtype outside bfloat16, float16, float32",
    "device": "the operands live on different devices, or on one for which there is no kernel",
    "layout": "a sparse or otherwise not strided tensor",
    "subclass": "a tensor subclass, whose own rules would be bypassed",
    "zero-dim": "a 0-d operand, which promotes by other rules",
    "shape": "a, b and the sum differ in shape, or are not known to be equal",
    "gate-shape": "the gate is not known to broadcast to the sum",
    "in-place": "the sigmoid or the product overwrites memory that somebody else reads",
    "in-place-visible": "the sum is written into memory that somebody else reads",
    "functorch": "inside vmap, grad or jvp of torch.func, where the op has no rule",
    "state-change-between": "grad mode, autocast or the stream changes between the reads and the sum",
    "mutation-between": "an operand is overwritten between the old read and the new one",
    "metadata-mutation": "an operand's shape or strides are changed in place",
    "result": "the op's result would differ from the sum in shape, dtype or device",
    "stride": "the op would lay the result out in memory otherwise than eager does",
    "kept-module": "a module whose call signature the exported program keeps would lose a value, or read another",
    "left-to-inner": "the inner compiler by itself would be faster (option profitable_only)",
}


def operands(site: Site) -> tuple[tuple[str, torch.fx.Node], ...]:
    return ("a", site.a), ("gate", site.gate), ("b", site.b)


def recorded(site: Site, effects: Effects) -> Refusal | None:
    for name, node in (*operands(site), ("the sum", site.add)):
        if tensor_of(node) is None:
            value = value_of(node)
            if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
                return Refusal("scalar-operand", "{} of {} is the number {}, not a tensor", name, site.add, node)
            return Refusal("no-metadata", "{} ({}) has no recorded tensor", name, node)
    return None


def product_read_once(site: Site, effects: Effects) -> Refusal | None:
    """The sigmoid may have other readers, and then stays; the product may not, or it would be computed twice."""
    if site.a in site.handed_on:
        return Refusal("multi-use", "{} adds {} to itself", site.add, site.a)
    for part in site.handed_on:
        found = readers(part)
        if len(found) != 1:
            names = ", ".join(sorted(reader.name for reader in found))
            return Refusal("multi-use", "{} has {} users ({})", part, len(found), names)
    return None


def known_dtypes(site: Site, effects: Effects) -> Refusal | None:
    dtypes = [tensor_of(node).dtype for _, node in operands(site)]
    total = tensor_of(site.add).dtype
    unknown = any(dtype not in DTYPES for dtype in (*dtypes, total))
    if len({*dtypes, total}) > 1 and (unknown or any(tensor_of(node).dim() == 0 for _, node in operands(site))):
        return Refusal("mixed-dtype", "a is {}, gate {}, b {}, the sum {}", *map(dtype_text, (*dtypes, total)))
    if unknown:
        return Refusal("dtype", "the operands are {}: allowed are bfloat16, float16, float32", dtype_text(total))
    promoted = reduce(torch.promote_types, dtypes)
    if site.overwrites is None and not site.in_place and promoted != total:
        text = "the op would give {}, which the operands promote to, eager gives {}"
        return Refusal("result", text, dtype_text(promoted), dtype_text(total))
    return None


def plain_tensors(site: Site, effects: Effects) -> Refusal | None:
    devices = {}
    for name, node in operands(site):
        tensor = tensor_of(node)
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
    """Why there is no kernel for tensors of a device, "" when there is one."""
    if device.type not in ("cpu", "cuda", "meta"):
        return f"there is no kernel for device {device.type}"
    if device.type != "cuda":
        return ""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed, and kernels for CUDA need it"
    # A graph for a GPU may be traced where there is none.
    if dtype is torch.bfloat16 and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has no bfloat16 arithmetic"
    return ""


def device_has_kernels(site: Site, effects: Effects) -> Refusal | None:
    for name, node in operands(site):
        tensor = tensor_of(node)
        problem = _missing_kernel(tensor.device, tensor.dtype)
        if problem:
            return Refusal("device", "{} ({}) is on {}: {}", name, node, tensor.device, problem)
    return None


def shapes_fit(site: Site, effects: Effects) -> Refusal | None:
    a, gate, b, total = (tensor_of(node) for node in (site.a, site.gate, site.b, site.add))
    if not (same_sizes(a.shape, total.shape) and same_sizes(site.b_shape or b.shape, total.shape)):
        return Refusal("shape", "a is {}, b {}, the sum {}", *map(shape_text, (a, b, total)))
    if not broadcasts_to(gate.shape if site.gate_shape is None else site.gate_shape, total.shape):
        return Refusal("gate-shape", "the gate is {}, the sum {}", shape_text(gate), shape_text(total))
    return None


def outside_functorch(site: Site, effects: Effects) -> Refusal | None:
    if effects.inside_functorch(site.parts[0], site.add):
        return Refusal("functorch", "{} stands inside a level of torch.func", site.add)
    return None


def one_state(site: Site, effects: Effects) -> Refusal | None:
    change = effects.state_change_between(site.parts[0], site.add)
    if change is not None:
        return Refusal("state-change-between", "{} runs between {} and {}", change, site.parts[0], site.add)
    return None


def operands_unwritten(site: Site, effects: Effects) -> Refusal | None:
    # The sigmoid may have other readers, and one of them may write into it; the product has none.
    reads = (
        ("gate", site.gate, site.sigmoid, site.add),
        ("the sigmoid", site.sigmoid, site.sigmoid, site.product),
        ("b", site.b, site.product, site.add),
    )
    for name, node, read, now in reads:
        writer = effects.write_between(node, read, now)
        if writer is not None:
            return Refusal("mutation-between", "{} may write {} ({}) before {}", writer, name, node, now)
    for name, node in (*operands(site), ("the sum", site.add)):
        writer = effects.reshaped_by(node)
        if writer is not None:
            return Refusal("metadata-mutation", "{} changes the shape of {} ({}) in place", writer, name, node)
    return None


def sum_owned(site: Site, effects: Effects) -> Refusal | None:
    """`a += ...` may become a fresh sum only when nobody can tell: a is the graph's own, fills its memory and is dead after.

    A view of a larger buffer shows what lies around it (`as_strided`, `untyped_storage`), to the graph's caller too.
    """
    if site.overwrites is None:
        return None
    if not fills_its_memory(site.add):
        return Refusal(
            "in-place-visible", "{} writes into {}, which is part of a larger buffer", site.add, site.overwrites
        )
    reader = effects.other_reader(site.overwrites, site.add)
    if reader is not None:
        text = "{} writes into {}, which {} shows or reads"
        return Refusal("in-place-visible", text, site.add, site.overwrites, reader)
    return None


def factors_owned(site: Site, effects: Effects) -> Refusal | None:
    """`b *= sigmoid(g)` and `g.sigmoid_()` may go only when nobody can tell, as `a += ...` may."""
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


def one_dtype(site: Site, options: Options) -> Refusal | None:
    dtypes = [tensor_of(node).dtype for _, node in (*operands(site), ("the sum", site.add))]
    if options.numerics == "eager" and len(set(dtypes)) > 1:
        return Refusal("mixed-dtype", "a is {}, gate {}, b {}, the sum {}", *map(dtype_text, dtypes))
    return None


def same_result_as_eager(site: Site, effects: Effects) -> Refusal | None:
    return same_result(site)


GUARDS = (
    recorded,
    product_read_once,
    known_dtypes,
    plain_tensors,
    device_has_kernels,
    shapes_fit,
    outside_functorch,
    one_state,
    sum_owned,
    factors_owned,
    operands_unwritten,
    same_result_as_eager,
)


def judge(site: Site, effects: Effects) -> Refusal | None:
    """The first guard's refusal, None when the site may be replaced."""
    for guard in GUARDS:
        refusal = guard(site, effects)
        if refusal is not None:
            return refusal
    return None
