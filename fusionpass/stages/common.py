"""What the stages around the combine ask alike: may the op be built here, and may these reads move to that node?"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch.fx import Node

from fusionpass.effects import Effects
from fusionpass.kernels.contract import DTYPES, MOST_COLUMNS, listed
from fusionpass.match import Refusal, Site
from fusionpass.nodes import is_cast, is_reshape, readers
from fusionpass.options import Options
from fusionpass.tensors import PLAIN_TYPES, dtype_text, fixed, same_sizes, shape_text, tensor_of

CODES = {
    "not-allowed": "the option 'rules' leaves the stage out",
    "numerics-eager": "bit-for-bit numerics keep the neighbours as they are",
    "needs-grad": "gradients are recorded, and the op has no backward for the stage",
    "gate-columns": "the gate is not one value per row",
    "hidden-size": "the number of columns is no fixed number within the limit",
    "no-metadata": "the tracer recorded no tensor for an operand",
    "shape": "an operand does not have the shape that the formula needs, or it is not known to",
    "dtype": "an operand or a result has a dtype that the op does not take or give",
    "subclass": "an operand is a tensor subclass or not strided",
    "device": "an operand lives on another device",
    "stride": "eager lays the result out in memory otherwise than the op does",
    "state-change-between": "grad mode, autocast or the stream changes between the old reads and the op",
    "mutation-between": "an operand is overwritten between the old read and the op",
    "metadata-mutation": "an operand's shape or strides are changed in place",
    "kept-module": "a module whose call signature the exported program keeps would lose a value, or read another",
}


def combinable(site: Site, options: Options) -> Refusal | None:
    """Why the site's formula cannot be computed by `moe_combine` at all."""
    if options.numerics == "eager":
        return Refusal("numerics-eager", "numerics 'eager' keeps what is around {} as it is", site.add)
    a, gate = tensor_of(site.a), gate_sizes(site)
    if not same_sizes(gate, (*a.shape[:-1], 1)):
        return Refusal(
            "gate-columns",
            "the gate has shape {}, and a {}: the stage needs one gate for each row",
            listed(gate),
            shape_text(a),
        )
    columns = fixed(a.shape[-1])
    if columns is None:
        return Refusal("hidden-size", "a has {} columns, which no trace fixes", a.shape[-1])
    if not 1 <= columns <= MOST_COLUMNS:
        return Refusal("hidden-size", "a has {} columns: allowed are 1 to {}", columns, MOST_COLUMNS)
    if torch.is_grad_enabled():
        for node in site.add.all_input_nodes + site.product.all_input_nodes + site.sigmoid.all_input_nodes:
            if tensor_of(node) is not None and tensor_of(node).requires_grad:
                return Refusal(
                    "needs-grad",
                    "{} requires gradients, and this stage has no backward: run under torch.no_grad() to let it join",
                    node,
                )
    return None


def gate_sizes(site: Site) -> tuple:
    """The shape in which the formula sees the gate."""
    return tuple(tensor_of(site.gate).shape) if site.gate_shape is None else site.gate_shape


def behind(node: Node, parts: list[Node], *, casts: bool = False) -> Node:
    """The node before the reshapes, and with `casts` the casts from float32, that end in `node`; `parts` gets those in
    front of it."""
    while (is_reshape(node) or (casts and is_cast(node))) and node.args and isinstance(node.args[0], Node):
        before, after = tensor_of(node.args[0]), tensor_of(node)
        if before is None or after is None or not same_sizes(before.shape[-1:], after.shape[-1:]):
            break
        if before.dtype != after.dtype and (is_reshape(node) or before.dtype is not torch.float32):
            break
        parts.insert(0, node)
        node = node.args[0]
    return node


def read_once(parts: Sequence[Node], reader: Node) -> Refusal | None:
    """Every part may be read inside the stage, or by `reader`, only."""
    inside = {*parts, reader}
    for part in parts:
        for other in readers(part):
            if other not in inside:
                return Refusal("used-elsewhere", "{} is read by {} too", part, other)
    return None


def kinds(site: Site, floats: Sequence, whole: Sequence = ()) -> Refusal | None:
    """The (name, tensor) pairs must be plain and on the sum's device. The op computes in float32, so the `floats` may be of
    any dtype that it takes; the `whole` ones are integers or bools, whose dtype the stage has asked for itself."""
    total = tensor_of(site.add)
    for group, dtypes in ((floats, DTYPES), (whole, None)):
        for name, tensor in group:
            if type(tensor) not in PLAIN_TYPES or tensor.layout is not torch.strided:
                return Refusal("subclass", "{} is a {} of layout {}", name, type(tensor).__name__, tensor.layout)
            if dtypes is not None and tensor.dtype not in dtypes:
                return Refusal(
                    "dtype", "{} is {}: allowed are bfloat16, float16, float32", name, dtype_text(tensor.dtype)
                )
            if tensor.device != total.device:
                return Refusal("device", "{} is on {}, the sum on {}", name, tensor.device, total.device)
            if tensor.requires_grad and torch.is_grad_enabled():
                return Refusal(
                    "needs-grad",
                    "{} requires gradients, and this stage has no backward: run under torch.no_grad() to let it join",
                    name,
                )
    return None


def movable(reads: Sequence, first: Node, now: Node, effects: Effects, own: Collection[Node] = ()) -> Refusal | None:
    """Whether the operands, (name, node, where it is read until now), may be read at `now`; `first` begins the stage.

    own: nodes of the stage itself, whose writes go with them.
    """
    change = effects.state_change_between(first, now)
    if change is not None:
        return Refusal("state-change-between", "{} runs between {} and {}", change, first, now)
    for name, node, read in reads:
        if node is None:
            continue
        by_path = isinstance(node, str)  # a parameter of a module, for which the graph has no node
        writer = effects.any_write_between(read, now) if by_path else effects.write_between(node, read, now, own)
        if writer is not None:
            return Refusal("mutation-between", "{} may write {} ({}) before {}", writer, name, node, now)
        writer = None if by_path else effects.reshaped_by(node)
        if writer is not None:
            return Refusal("metadata-mutation", "{} changes the shape of {} ({}) in place", writer, name, node)
    return None


def narrowed(total: Node) -> Node | None:
    """The one cast of a float32 sum to a 16-bit dtype, where there is just one."""
    if tensor_of(total).dtype is not torch.float32:
        return None
    casts = [reader for reader in readers(total) if is_cast(reader) and reader.args[:1] == (total,)]
    narrow = [cast for cast in casts if (value := tensor_of(cast)) is not None and value.dtype in DTYPES[:2]]
    plain = len(narrow) == 1 and same_sizes(tensor_of(narrow[0]).shape, tensor_of(total).shape)
    return narrow[0] if plain and tensor_of(narrow[0]).device == tensor_of(total).device else None


def narrow_to(site: Site, cast: Node) -> None:
    """Have the op store what the cast makes of the sum, which nobody else reads."""
    site.end = cast
    site.parts.append(cast)


def operands(site: Site) -> list[tuple[str, Node | str | None]]:
    """What the op reads of the formula and the stages before it."""
    found = [("b", site.b)]
    if site.finalize is None:
        found.append(("a", site.a))
    else:
        routed = site.finalize
        found += [
            ("y", routed.y),
            ("topk_weights", routed.weights),
            ("inverse", routed.inverse),
            ("masked", routed.masked),
        ]
    if site.projection is None:
        return [*found, ("gate", site.gate)]
    projection = site.projection
    return [*found, ("x", projection.x), ("weight", projection.weight), ("bias", projection.bias)]
