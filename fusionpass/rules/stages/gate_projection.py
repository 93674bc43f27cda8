"""gate = x @ weight.T + bias, one output column: the gate logit is computed inside the kernel.

    a + sigmoid(linear(x, weight, bias)) * b  ->  gate_projected_add(x, weight, bias, a, b)

The logit is one number per row of a and b. The nodes between the projection and the sigmoid may only change the shape of its
leading dimensions, so that rows keep their order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.fx import Node

from fusionpass.graph.effects import Effects
from fusionpass.graph.naming import describe
from fusionpass.graph.nodes import is_cast, is_reshape, readers
from fusionpass.graph.refusal import Refusal
from fusionpass.graph.tensors import PLAIN_TYPES, dtype_text, known_equal, same_sizes, shape_text, tensor_of
from fusionpass.graph.vocabulary import Meaning, Vocabulary
from fusionpass.rules.cost import saved_projection
from fusionpass.rules.gated_add_core import GatedSite
from fusionpass.rules.moving import movable
from fusionpass.rules.replacement import Op
from fusionpass.rules.rule import Stage
from fusionpass.rules.same_results import same_result
from fusionpass.rules.site import Operand
from fusionpass.rules.stages import common

GATE_PROJECTED_ADD = Op(
    torch.ops.fusionpass.gate_projected_add.default,
    names={"weight": "gate_weight", "bias": "gate_bias"},
    results=("sum",),
    rows=common.ROWS,
    contiguous=True,
    trains=True,
    opened_on_cpu=True,
    widened=("x", "gate_weight", "gate_bias"),
    weights=("gate_weight",),
    summed=("x",),
)


class Projection(NamedTuple):
    """The gate logit as x . weight + bias; `weight` and `bias` are nodes, or attribute paths of an nn.Linear."""

    x: Node
    weight: Node | str
    bias: Node | str | None


def grow(site: GatedSite, words: Vocabulary, effects: Effects) -> GatedSite | Refusal:
    """The site with the projection, or why it stays outside."""
    gate = site.node("gate")
    if site.numbers["numerics"] == "eager":
        return Refusal("numerics-eager", "numerics 'eager' keeps {} as it is", gate)
    projection, views = _behind_reshapes(gate)
    meaning = words.meaning(projection)
    if meaning is None or meaning.op not in ("linear", "matmul", "addmm"):
        return Refusal("not-a-projection", "the gate logit comes from {}", describe(projection, words))
    if meaning.oddity is not None:
        return meaning.oddity
    parts = [projection, *views]
    for part, reader in zip(parts, [*views, site.sigmoid], strict=True):
        if readers(part) != [reader]:
            return Refusal("gate-used-elsewhere", "{} has {} users", part, len(readers(part)))
    if len(readers(site.sigmoid)) != 1 or site.sigmoid is site.node("b"):
        return Refusal("gate-used-elsewhere", "{} has {} users", site.sigmoid, len(readers(site.sigmoid)))
    found = _as_projection(meaning)
    values = {"x": found.x, "gate_weight": found.weight, "gate_bias": found.bias}
    read = {
        name: Operand(value, projection, name.removeprefix("gate_"))
        for name, value in values.items()
        if value is not None
    }
    larger = site.grown("gate_projection", before=parts, operands=read, without=["gate"], op=GATE_PROJECTED_ADD)
    refusal = _shapes(site, found, words)
    refusal = refusal or movable([(operand.said, operand) for operand in read.values()], projection, site.at, effects)
    return refusal or same_result(larger) or larger


def _behind_reshapes(gate: Node) -> tuple[Node, list[Node]]:
    """The node that computes the logit, and the reshapes and no-op casts after it, in data-flow order."""
    node, views = gate, []
    while (is_reshape(node) or is_cast(node)) and node.args and isinstance(node.args[0], Node):
        before, after = tensor_of(node.args[0]), tensor_of(node)
        if before is None or after is None or before.dtype != after.dtype:
            break
        views.append(node)
        node = node.args[0]
    return node, views[::-1]


def _as_projection(meaning: Meaning) -> Projection:
    if meaning.op == "addmm":
        bias, x, weight = meaning.operands
        return Projection(x, weight, bias)
    x, weight, *bias = meaning.operands
    return Projection(x, weight, bias[0] if bias else None)


def _shapes(site: GatedSite, found: Projection, words: Vocabulary) -> Refusal | None:
    logit = site.node("gate")
    a, gate = tensor_of(site.node("a")), tensor_of(logit)
    x = tensor_of(found.x)
    weight, bias = words.tensor(found.weight), words.tensor(found.bias)
    if x is None or weight is None or (found.bias is not None and bias is None):
        return Refusal("no-metadata", "x, weight or bias of {} has no recorded tensor", logit)
    if not same_sizes(site.seen("gate"), (*a.shape[:-1], 1)):
        return Refusal(
            "gate-columns",
            "the gate has shape {}, and a {}: the stage needs one gate for each row",
            shape_text(gate),
            shape_text(a),
        )
    if x.dim() == 0 or weight.dim() not in (1, 2) or not known_equal(weight.numel(), x.shape[-1]):
        return Refusal("gate-columns", "x is {}, the weight {}", shape_text(x), shape_text(weight))
    if known_equal(x.shape[-1], 0):
        return Refusal("gate-columns", "x is {}, so there is nothing to multiply", shape_text(x))
    if bias is not None and not known_equal(bias.numel(), 1):
        return Refusal("gate-columns", "the bias is {}, not one number", shape_text(bias))
    for tensor in (x, weight) if bias is None else (x, weight, bias):
        if type(tensor) not in PLAIN_TYPES or tensor.layout is not torch.strided:
            return Refusal("subclass", "{} of layout {} feeds {}", type(tensor).__name__, tensor.layout, logit)
        # Autocast's linear takes float32 and gives a narrower logit. The op runs under autocast too, and casts the same way.
        if tensor.dtype not in (gate.dtype, torch.float32):
            return Refusal("dtype", "{} feeds {}, which is {}", dtype_text(tensor.dtype), logit, dtype_text(gate.dtype))
        if tensor.device != a.device:
            return Refusal("device", "{} feeds {}, a is on {}", tensor.device, logit, a.device)
    return None


STAGE = Stage(
    name="gate_projection",
    formula="gate = linear(x, weight, bias)",
    needs=(
        "linear, mm, matmul, mv or addmm with one output column",
        "only views that keep the rows' order between it and the sigmoid",
        "x, weight, bias in the dtype of the logit, or float32 under autocast, unwritten until the sum",
        "numerics 'fp32': in 'eager' the projection's own reduction order stays",
    ),
    codes={
        "not-allowed": "the option 'rules' leaves the stage out",
        "not-a-projection": "the gate logit is computed by something else",
        "gate-used-elsewhere": "the logit or the sigmoid has other readers, so the projection must stay",
        "gate-columns": "the projection has more than one column, or the gate is not one value per row",
        "numerics-eager": "with bit-for-bit numerics the projection stays a linear of its own",
        "dtype": "x, weight or bias has another dtype than the logit, and autocast would not cast it",
        "subclass": "x, weight or bias is a tensor subclass or not strided",
        "device": "x, weight or bias lives on another device",
        "no-metadata": "the tracer recorded no tensor for x, weight or bias",
        "state-change-between": "grad mode, autocast or the stream changes between the projection and the sum",
        "mutation-between": "x, weight or bias is overwritten between the projection and the sum",
        "metadata-mutation": "the shape of x, weight or bias is changed in place",
        "result": "the op's result would differ from the sum in shape, dtype or device",
        "stride": "the op's result would have another layout in memory than eager's",
        "scaled": "alpha or beta other than 1",
        "odd-call": "the call has arguments the formula does not have",
        "out-argument": "the projection writes into a given tensor",
        "module-hook": "the projection's module has hooks",
        "module-forward": "the projection's module runs a forward that is not torch's own",
    },
    grow=grow,
    saves=saved_projection,
)
