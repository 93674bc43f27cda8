"""The rule a + sigmoid(gate) * b: what its operands must be, what it grows over, what it becomes."""

from __future__ import annotations

from functools import reduce

import torch

from fusionpass.graph.effects import Effects
from fusionpass.graph.nodes import readers
from fusionpass.graph.refusal import Refusal
from fusionpass.graph.tensors import broadcasts_to, dtype_text, same_sizes, shape_text, tensor_of
from fusionpass.kernels.contract import DTYPES
from fusionpass.rules import guards
from fusionpass.rules.gated_add_core import ANCHORS, GatedSite, find
from fusionpass.rules.replacement import Op
from fusionpass.rules.rule import Rule
from fusionpass.rules.site import Site
from fusionpass.rules.stages import common, finalize, gate_projection, residual, rms_norm

CODES = {
    "view-between": "a view between the sigmoid, the product and the sum reorders or drops rows, or may do so",
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
    "mixed-dtype": "the operands differ in dtype, and one is 0-d, or the op does not take one, or numerics is 'eager'",
    "dtype": "a dtype outside bfloat16, float16, float32",
    "device": guards.CODES["device"],
    "layout": guards.CODES["layout"],
    "subclass": guards.CODES["subclass"],
    "zero-dim": guards.CODES["zero-dim"],
    "shape": "a, b and the sum differ in shape, or are not known to be equal",
    "gate-shape": "the gate is not known to broadcast to the sum",
    "in-place": "the sigmoid or the product overwrites memory that somebody else reads",
    "in-place-visible": "the sum is written into memory that somebody else reads",
    "functorch": guards.CODES["functorch"],
    "state-change-between": "grad mode, autocast or the stream changes between the reads and the sum",
    "mutation-between": guards.CODES["mutation-between"],
    "metadata-mutation": guards.CODES["metadata-mutation"],
    "result": "the op's result would differ from the sum in shape, dtype or device",
    "stride": guards.CODES["stride"],
    "kept-module": guards.CODES["kept-module"],
    "left-to-inner": guards.CODES["left-to-inner"],
}


def product_read_once(site: GatedSite, effects: Effects) -> Refusal | None:
    """The sigmoid may have other readers, and stays then. The product may not, or it would be computed twice."""
    a = site.node("a")
    if a in site.handed_on:
        return Refusal("multi-use", "{} adds {} to itself", site.anchor, a)
    for part in site.handed_on:
        found = readers(part)
        if len(found) != 1:
            names = ", ".join(sorted(reader.name for reader in found))
            return Refusal("multi-use", "{} has {} users ({})", part, len(found), names)
    return None


def known_dtypes(site: GatedSite, effects: Effects) -> Refusal | None:
    tensors = [tensor_of(node) for _, node in guards.operands(site)]
    dtypes = [tensor.dtype for tensor in tensors]
    total = tensor_of(site.anchor).dtype
    unknown = any(dtype not in DTYPES for dtype in (*dtypes, total))
    if len({*dtypes, total}) > 1 and (unknown or any(tensor.dim() == 0 for tensor in tensors)):
        return Refusal("mixed-dtype", "a is {}, gate {}, b {}, the sum {}", *map(dtype_text, (*dtypes, total)))
    if unknown:
        return Refusal("dtype", "the operands are {}: allowed are bfloat16, float16, float32", dtype_text(total))
    promoted = reduce(torch.promote_types, dtypes)
    if site.overwrites is None and not site.in_place and promoted != total:
        text = "the operands promote to {}, so the op would give it, but eager gives {}"
        return Refusal("result", text, dtype_text(promoted), dtype_text(total))
    return None


def shapes_fit(site: GatedSite, effects: Effects) -> Refusal | None:
    a, gate, b, total = (tensor_of(node) for node in (site.node("a"), site.node("gate"), site.node("b"), site.anchor))
    if not (same_sizes(a.shape, total.shape) and same_sizes(site.seen("b"), total.shape)):
        return Refusal("shape", "a is {}, b {}, the sum {}", *map(shape_text, (a, b, total)))
    if not broadcasts_to(site.seen("gate"), total.shape):
        return Refusal("gate-shape", "the gate is {}, the sum {}", shape_text(gate), shape_text(total))
    return None


def sigmoid_unwritten(site: GatedSite, effects: Effects) -> Refusal | None:
    """The sigmoid may have other readers, and one of them may write into it. The product has no other readers."""
    writer = effects.write_between(site.sigmoid, site.sigmoid, site.product)
    if writer is not None:
        text = "{} may write the sigmoid ({}) before {}"
        return Refusal("mutation-between", text, writer, site.sigmoid, site.product)
    return None


def one_dtype(site: Site) -> Refusal | None:
    """The op rounds as the nodes do if all operands have one dtype."""
    dtypes = [tensor_of(node).dtype for _, node in (*guards.operands(site), ("the sum", site.anchor))]
    if len(set(dtypes)) > 1:
        return Refusal("mixed-dtype", "a is {}, gate {}, b {}, the sum {}", *map(dtype_text, dtypes))
    return None


RULE = Rule(
    name="gated_add",
    formula="a + sigmoid(gate) * b",
    needs=(
        "a, b and the sum of one shape; the gate broadcasts to it",
        "one dtype of bfloat16, float16, float32; one device; plain strided tensors",
        "a product nobody else reads, added with no cast or view in between",
        "no write to an operand between the old reads and the sum",
    ),
    codes=CODES,
    op=Op(
        torch.ops.fusionpass.gated_add.default,
        results=("sum",),
        rows=common.ROWS,
        contiguous=True,
        trains=True,
        opened=True,
    ),
    anchors=ANCHORS,
    find=find,
    guards=(
        guards.recorded,
        product_read_once,
        known_dtypes,
        guards.plain_tensors,
        guards.device_has_kernels,
        shapes_fit,
        guards.outside_functorch,
        guards.one_state,
        guards.sum_owned,
        guards.factors_owned,
        sigmoid_unwritten,
        guards.operands_unwritten,
        guards.same_result_as_eager,
    ),
    bits=one_dtype,
    stages=(gate_projection.STAGE, finalize.STAGE, residual.STAGE, rms_norm.STAGE),
    absent="no sigmoid feeds a product that feeds an add",
)
