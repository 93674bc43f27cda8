"""Whether the inner compiler by itself would be faster: what the op saves, minus what an opaque op keeps from being fused.

A compiler that runs graphs node by node ("eager", "aot_eager", "cudagraphs", a callable of the user's) has nothing to lose.
Inductor makes one kernel of the weighted sum, the formula, the residual add and the norm, and a second one of the gate's
projection. Our op saves the second kernel. If it does not cover all of the first one, the rest becomes a kernel of its
own, and the tensor between the two goes through memory:

    saved = what the rule and its stages say: PROJECTION_US where the op computes the gate logit
    lost  = sum of KERNEL_US + bytes / BYTES_PER_US over the neighbours that Inductor would have fused with the formula

A site is left alone if it loses more than it saves. A tie is rewritten.
"""

from __future__ import annotations

from torch.fx import Node

from fusionpass.graph.effects import Effects
from fusionpass.graph.identity import torch_name
from fusionpass.graph.nodes import behind_views, gather_of, is_cast, is_view, pointwise_or_reduction, readers
from fusionpass.graph.refusal import Refusal
from fusionpass.graph.tensors import known_equal, tensor_of
from fusionpass.private import OpOverload
from fusionpass.rules.site import Site
from fusionpass.rules.traffic import bytes_of

# Measured on one H100 (torch 2.11, bf16, CUDA-graph replay).
PROJECTION_US = 4.0  # Inductor's two kernels minus our gate_projected_add: 3.6 at 1 x 2048, 5.1 at 32 x 4096
TUNED_PROJECTION_US = 0.5  # if tuned by coordinate descent, the projection fuses: 0.1 at 32 x 2048, 0.6 at 1 x 2048
# A weighted sum, with the residual and the norm: Inductor reads gathered rows about four times, and others twice, where we
# read them once. Top-8, bf16: 1024 x 7168 gathered 179 us, 59 here; in order 96 and 56. At one row 0.3 (7168) to 1.9 (2048).
FINALIZE_US = 1.0
GATHERED_READS = 2.5
SUMMED_READS = 0.9
KERNEL_US = 1.3  # one more kernel in a replayed graph: the smallest one, gated_add of one row, takes 1.14
BYTES_PER_US = 3.0e6  # a copy much larger than the L2 cache moves 3.0 TB/s, reads and writes together

FUSING = ("inductor",)
# Matrix products. With one row, tuned Inductor makes a product and a sum of each, into which it fuses what reads them.
PRODUCTS = frozenset("linear matmul mm mv addmm bmm".split())


def saved_projection(site: Site, tuned: bool) -> float:
    """Microseconds that the op saves if it also computes the gate's projection."""
    return TUNED_PROJECTION_US if tuned else PROJECTION_US


def saved_finalize(site: Site, tuned: bool) -> float:
    """Microseconds that the op saves if it also computes the weighted sum over the experts."""
    moved = bytes_of(tensor_of(site.node("a")))
    reads = GATHERED_READS if site.node("inverse") is not None else SUMMED_READS
    return FINALIZE_US + reads * (moved or 0) / BYTES_PER_US


def left_to_inner(site: Site, effects: Effects, inner: object, saved: float, tuned: bool = False) -> Refusal | None:
    """Why it is better to leave the site to the inner compiler; None if it is not.

    Args:
        inner: the option of this name.
        saved: microseconds that the op saves the inner compiler.
        tuned: Inductor tunes its kernels by coordinate descent.
    """
    if inner not in FUSING or site.numbers["numerics"] == "eager":  # eager's bits are more important than the time
        return None
    # Inductor gets the bare formula, and on a CPU the whole region, as an expression: see `operators.in_inductor`.
    if site.op.opened or (site.op.opened_on_cpu and tensor_of(site.end).device.type == "cpu"):
        return None
    product = _folded_into(site) if tuned else None
    if product is not None:
        # qwen2_moe, 6 layers, batch 1: with the op a step took 1.01 to 1.06 of tuned torch.compile's in three compilations.
        text = "{}, tuned, computes {} of one row as a sum and fuses the formula into it: an op takes up to 6% longer"
        return Refusal("left-to-inner", text, inner, product)
    lost = [*_producers(site), *_consumers(site, effects)]
    moved = [bytes_of(tensor_of(node)) for node in lost]
    if not lost:
        return None
    names = ", ".join(node.name for node in lost)
    if None in moved:
        return Refusal(
            "left-to-inner",
            "{} by itself would compute {} in one kernel with this, and the size of that is unknown",
            inner,
            names,
        )
    cost = len(lost) * KERNEL_US + 2 * sum(moved) / BYTES_PER_US
    if cost <= saved:
        return None
    text = (
        "{} by itself would compute {} in one kernel with this: apart they take {:.1f} us more, the op saves {:.1f} us"
    )
    return Refusal("left-to-inner", text, inner, names, cost, saved)


def _producers(site: Site) -> list[Node]:
    """The nodes that compute an operand only for the op, and that Inductor would compute inside its kernel."""
    operands = [site.node(name) for name in site.op.rows]
    inside = set(site.parts)
    found = []
    for operand in dict.fromkeys(node for node in operands if node is not None):
        node = behind_views(operand)
        if _fuses(node) and all(_only_inside(reader, inside) for reader in readers(node)):
            found.append(node)
    return found


def _folded_into(site: Site) -> Node | None:
    """A product of one row that gives an operand, into which tuned Inductor would fuse the rest."""
    total = tensor_of(site.end)
    if not known_equal(total.numel(), total.shape[-1]):
        return None
    operands = (site.node(name) for name in site.op.rows)
    sources = (behind_views(node) for node in operands if node is not None)
    return next((node for node in sources if torch_name(node) in PRODUCTS), None)


def _only_inside(reader: Node, inside: set[Node]) -> bool:
    """Whether the reader belongs to the site, or is a view that only the site or the caller reads."""
    if reader in inside or reader.op == "output":
        return True
    return is_view(reader) and all(_only_inside(each, inside) for each in readers(reader))


def _consumers(site: Site, effects: Effects) -> list[Node]:
    """Results with a reader that Inductor could compute in the same kernel: its other operands stand before the op."""
    inside, now = set(site.parts), effects.position[site.end]
    return [result for result in site.results if _read_by_pointwise(result, inside, now, effects)]


def _read_by_pointwise(node: Node, inside: set[Node], now: int, effects: Effects) -> bool:
    for reader in readers(node):
        if reader in inside:
            continue
        if is_view(reader) and _read_by_pointwise(reader, inside, now, effects):
            return True
        others = [operand for operand in reader.all_input_nodes if operand is not node]
        if _fuses(reader) and all(effects.position.get(other, now) < now for other in others):
            return True
    return False


def _fuses(node: Node) -> bool:
    """Whether Inductor generates the node's code itself, so that it can share a kernel with its neighbours."""
    if node.op not in ("call_function", "call_method") or tensor_of(node) is None:
        return False
    if isinstance(node.target, OpOverload) and node.target.namespace not in ("aten", "prims"):
        return False
    return is_cast(node) or gather_of(node) is not None or pointwise_or_reduction(torch_name(node))
