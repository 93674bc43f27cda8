"""Questions that several stages ask: may the op be built here, and may these reads move to that node?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from fusionpass.graph.nodes import is_cast, is_reshape, readers
from fusionpass.graph.refusal import Refusal
from fusionpass.graph.tensors import PLAIN_TYPES, dtype_text, fixed, same_sizes, shape_text, tensor_of
from fusionpass.kernels.contract import DTYPES, MOST_COLUMNS, listed
from fusionpass.rules.replacement import Op
from fusionpass.rules.site import Site

# Operands of our ops with the same rows as the result. The routing weights and the norm's weight do not affect its dtype.
ROWS = ("b", "residual", "a", "gate")
# The op for any rule and any stages that have joined: each stage has an operand or a number of its own.
MOE_COMBINE = Op(
    torch.ops.fusionpass.moe_combine.default,
    results=("sum", "normed sum"),
    rows=ROWS,
    shaped=("residual", "b"),
    contiguous=True,
    casts=True,
    opened_on_cpu=True,
    widened=("x", "gate_weight", "gate_bias"),
    weights=("gate_weight",),
    summed=("x",),
    indexes={"inverse": "a"},
)

YIELDED = {
    "not-there": "a later stage takes what follows the sum, such as the residual an add that is no shared expert's"
}
CODES = {
    "not-allowed": "the option 'rules' leaves the stage out",
    "numerics-eager": "bit-for-bit numerics keep the neighbours as they are",
    "needs-grad": "gradients are recorded, and the op has no backward for the stage",
    "gate-columns": "the gate is not one value per row",
    "hidden-size": "the number of columns is not fixed, or not within the limit",
    "no-metadata": "the tracer recorded no tensor for an operand",
    "shape": "an operand does not have the shape that the formula needs, or is not known to have it",
    "dtype": "an operand or a result has a dtype that the op does not take or give",
    "subclass": "an operand is a tensor subclass or not strided",
    "device": "an operand lives on another device",
    "stride": "eager's result has another layout in memory than the op's",
    "state-change-between": "grad mode, autocast or the stream changes between the old reads and the op",
    "mutation-between": "an operand is overwritten between the old read and the op",
    "metadata-mutation": "an operand's shape or strides are changed in place",
    "kept-module": "a module whose call signature the exported program keeps would lose a value, or read another",
}


def combinable(site: Site) -> Refusal | None:
    """Why the site's formula cannot be computed by `moe_combine` at all."""
    if site.numbers["numerics"] == "eager":
        return Refusal("numerics-eager", "numerics 'eager' keeps what is around {} as it is", site.anchor)
    total = tensor_of(site.anchor)
    if "gate" in site.core and not same_sizes(site.seen("gate"), (*total.shape[:-1], 1)):
        return Refusal(
            "gate-columns",
            "the gate has shape {}, and a {}: the stage needs one gate for each row",
            listed(site.seen("gate")),
            shape_text(total),
        )
    refusal = hidden_size(site)
    if refusal is not None:
        return refusal
    if torch.is_grad_enabled():
        for node in (operand for part in reversed(site.parts) for operand in part.all_input_nodes):
            value = tensor_of(node)
            if value is not None and value.requires_grad:
                return Refusal(
                    "needs-grad",
                    "{} requires gradients, and this stage has no backward: run under torch.no_grad() to let it join",
                    node,
                )
    return None


def hidden_size(site: Site) -> Refusal | None:
    """A program computes a whole row, and the kernel is compiled for its number of columns."""
    total = tensor_of(site.anchor)
    columns = fixed(total.shape[-1])
    if columns is None:
        return Refusal("hidden-size", "a has {} columns, which is not a fixed number", total.shape[-1])
    if not 1 <= columns <= MOST_COLUMNS:
        return Refusal("hidden-size", "a has {} columns: allowed are 1 to {}", columns, MOST_COLUMNS)
    return None


def behind(node: Node, *, casts: bool = False) -> tuple[Node, list[Node]]:
    """The node before the reshapes that end in `node`, and the nodes after it. With `casts`, casts from float32 count
    too."""
    after: list[Node] = []
    while (is_reshape(node) or (casts and is_cast(node))) and node.args and isinstance(node.args[0], Node):
        value, viewed = tensor_of(node.args[0]), tensor_of(node)
        if value is None or viewed is None or not same_sizes(value.shape[-1:], viewed.shape[-1:]):
            break
        if value.dtype != viewed.dtype and (is_reshape(node) or value.dtype is not torch.float32):
            break
        after.append(node)
        node = node.args[0]
    return node, after[::-1]


def read_once(parts: Sequence[Node], reader: Node) -> Refusal | None:
    """Every part may be read only inside the stage or by `reader`."""
    inside = {*parts, reader}
    for part in parts:
        for other in readers(part):
            if other not in inside:
                return Refusal("used-elsewhere", "{} is read by {} too", part, other)
    return None


def kinds(total: Node, floats: Sequence, whole: Sequence = ()) -> Refusal | None:
    """The (name, tensor) pairs must be plain and on the sum's device. The op computes in float32, so the `floats` may have
    any dtype that it takes. The `whole` ones are integers or bools; the stage has checked their dtype itself."""
    device = tensor_of(total).device
    for group, dtypes in ((floats, DTYPES), (whole, None)):
        for name, tensor in group:
            if type(tensor) not in PLAIN_TYPES or tensor.layout is not torch.strided:
                return Refusal("subclass", "{} is a {} of layout {}", name, type(tensor).__name__, tensor.layout)
            if dtypes is not None and tensor.dtype not in dtypes:
                return Refusal(
                    "dtype", "{} is {}: allowed are bfloat16, float16, float32", name, dtype_text(tensor.dtype)
                )
            if tensor.device != device:
                return Refusal("device", "{} is on {}, the sum on {}", name, tensor.device, device)
            if tensor.requires_grad and torch.is_grad_enabled():
                return Refusal(
                    "needs-grad",
                    "{} requires gradients, and this stage has no backward: run under torch.no_grad() to let it join",
                    name,
                )
    return None


def narrowed(total: Node) -> Node | None:
    """The cast of a float32 sum to a 16-bit dtype, if there is exactly one."""
    if tensor_of(total).dtype is not torch.float32:
        return None
    casts = [reader for reader in readers(total) if is_cast(reader) and reader.args[:1] == (total,)]
    narrow = [cast for cast in casts if (value := tensor_of(cast)) is not None and value.dtype in DTYPES[:2]]
    plain = len(narrow) == 1 and same_sizes(tensor_of(narrow[0]).shape, tensor_of(total).shape)
    return narrow[0] if plain and tensor_of(narrow[0]).device == tensor_of(total).device else None
