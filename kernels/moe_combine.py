"""moe_combine: the combine region of a sparse layer. Each stage of it is optional, except the formula

    sum    = residual + post_norm(scale * (routed_scale * routed + sigmoid(logit) * b))
    routed = a, or sum_k weights[t, k] * y[inverse[t, k]]        without a gate b is added as it is, if there is a b
    normed = sum / sqrt(mean(sum ** 2) + eps) * (offset + norm_weight)        logit = gate, or x . gate_weight + bias

shapes    T rows of H <= 16384 columns in b, residual, sum, normed and a; y is [T * K, H] or [T, K, H] with K <= 32
strides   any; an operand without one stride from row to row is copied first; the results are contiguous
dtypes    bf16, fp16, fp32: one for x, gate_weight and gate_bias, one for each of the others and one for the results;
          inverse int32 or int64, from -T * K to T * K - 1, which the caller must make sure of;
          arithmetic in fp32, also the sums over k, and one rounding per result
traffic   T * H * (K or 1, + 1 for b, + 1 for x, + 1 for residual, + 1 for sum, + 1 for normed) * itemsize, and little more
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from operator import itemgetter

import torch
import triton
from torch import Tensor

from .arithmetic import INTERPRETED
from .contract import known
from .gate_projected_add import (
    BLOCK_LIMIT,
    COLUMNS_PER_WARP,
    FEW_WARPS,
    FEW_WARPS_UP_TO,
    MOST_WARPS,
    column_stride,
    vector,
)
from .gate_projected_add_aten import constant_logit
from .launch_limits import needs_int64
from .launching import Calls, Launch, Result, in_order, layouts, warps_for
from .layout import contiguous_strides
from .moe_combine_aten import TENSORS, Arguments, check_moe_combine
from .moe_combine_kernel import moe_combine_kernel
from .programmatic_launch import dependent_launch

# Registers of a thread for terms that are being loaded. With fewer, short rows wait for memory. More do not help: see
# fusionpass/bench/measured.md.
REGISTERS = 40
# Bytes of a row from which 32 bits hold every index of a row: 2 ** 31 of them would fill 512 GB. Arithmetic on 64 bits would
# take eight times the instructions, between the indices and the loads that wait for them. Not with a projection: there the
# assembler then spreads the loads otherwise, and 1024 x 2048 with 10 terms takes 24.3 us (without: 23.3).
NARROW_FROM = 256


# The kernel's pointers in its order, each with the op's argument to which it points; then its results.
OPERANDS = {
    "A": "a",
    "WEIGHTS": "topk_weights",
    "INVERSE": "inverse",
    "MASKED": "masked",
    "B": "b",
    "GATE": "gate",
    "X": "x",
    "W": "gate_weight",
    "BIAS": "gate_bias",
    "RESIDUAL": "residual",
    "NORM": "norm_weight",
    "POST": "post_norm_weight",
}
RESULTS = ("SUM", "NORMED")
NAMES = tuple(OPERANDS.values())
# The kernel's strides, each with the operand that it belongs to, and the dim of its rows. Not here: the weight of the gate.
STEPS = {
    "a_row": ("a", 0),
    "a_col": ("a", 1),
    "weight_step": ("topk_weights", 0),
    "inverse_step": ("inverse", 0),
    "masked_step": ("masked", 0),
    "b_row": ("b", 0),
    "b_col": ("b", 1),
    "gate_row": ("gate", 0),
    "x_row": ("x", 0),
    "x_col": ("x", 1),
    "r_row": ("residual", 0),
    "r_col": ("residual", 1),
    "norm_step": ("norm_weight", 0),
    "post_step": ("post_norm_weight", 0),
}
# One number per row, slot or column.
FLAT = ("topk_weights", "inverse", "masked", "gate", "norm_weight", "post_norm_weight")
AS_THEY_ARE = ("gate_weight", "gate_bias")
A_AT, B_AT = NAMES.index("a"), NAMES.index("b")
operands_of = itemgetter(*map(Arguments._fields.index, NAMES))  # from the op's arguments, in the kernel's order


def _as_rows(name: str, tensor: Tensor | None) -> Tensor | None:
    """The operand with one stride from row to row, [rows, columns], or from number to number."""
    if tensor is None or name in AS_THEY_ARE:
        return tensor
    if name in FLAT:
        return tensor if tensor.dim() == 1 else tensor.reshape(-1)
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def rows_of(given: Arguments) -> dict[str, Tensor | None]:
    """The operands by name, in the kernel's order, with one stride from row to row."""
    return {name: _as_rows(name, tensor) for name, tensor in zip(NAMES, operands_of(given), strict=True)}


class _Prepared:
    """What follows for a call from the layouts of its operands: the results' memory and the launch."""

    __slots__ = ("_dtype", "_flat", "_launch", "_norm", "_result")

    def __init__(self, given: Arguments):
        rows, operands = rows_of(given), operands_of(given)
        # Most operands have the form of rows already. These do not.
        self._flat = [i for i, name in enumerate(NAMES) if rows[name] is not operands[i]]
        shape = given.shape()
        self._dtype = given.result_dtype()
        self._result = Result(given.a, contiguous_strides(shape), self._dtype, shape)
        self._norm = given.eps is not None
        count = prod(shape[:-1])
        self._launch = _launch(rows, count, given) if count else None

    def __call__(self, operands: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        b = operands[B_AT]
        if b is None:
            b = operands[A_AT]
        total = self._result.empty(b)
        normed = self._result.empty(b) if self._norm else b.new_empty(0, dtype=self._dtype)
        if self._launch is not None:
            if self._flat:
                operands = list(operands)
                for i in self._flat:
                    operands[i] = _as_rows(NAMES[i], operands[i])
            self._launch(*[b if t is None else t for t in operands], total, normed)
        return total, normed


def numbers_of(
    rows: dict[str, Tensor | None], given: Arguments, dependent: bool
) -> tuple[dict[str, int | bool | float], int]:
    """The kernel's arguments other than its pointers, by the names of its signature, and its warps. Absent operands cost
    nothing: their loads are compiled away."""

    def has(name: str) -> bool:
        return rows[name] is not None

    steps = {step: rows[name].stride(dim) if has(name) else 0 for step, (name, dim) in STEPS.items()}
    x, weight = rows["x"], rows["gate_weight"]
    h = rows["a"].shape[-1]
    k = h if x is None else x.shape[-1]
    w_col = 0 if weight is None else column_stride(weight)
    block_h = triton.next_power_of_2(h)
    block_k = min(triton.next_power_of_2(k), max(block_h, BLOCK_LIMIT))
    most = FEW_WARPS if max(k, h) <= FEW_WARPS_UP_TO else MOST_WARPS
    warps = warps_for(max(k, h), COLUMNS_PER_WARP, most)
    # Offsets within a row. Lanes past its end are masked, but their offsets must not wrap around either.
    columns = [block_h * steps[step] for step in ("a_col", "b_col", "r_col", "norm_step", "post_step")]
    x_col = steps["x_col"]
    wide = needs_int64(max(*columns, block_k * x_col, block_k * w_col) + k * max(x_col, w_col))
    starts = [t.stride(0) for name, t in rows.items() if t is not None and t.dim() == 2 and name not in AS_THEY_ARE]
    in_flight = max(REGISTERS * 4 * 32 * warps // (block_h * rows["a"].element_size()), 1)
    itemsize = min(rows[name].element_size() for name in ("a", "b", "x", "residual") if has(name))
    numbers = {
        **steps,
        "w_col": w_col,
        "TOP_K": given.top_k,
        "INDEXED": has("inverse"),
        "PERMUTED": given.permuted,
        "HAS_MASK": has("masked"),
        "PROJECTED": has("x"),
        "HAS_BIAS": has("gate_bias"),
        "HAS_RESIDUAL": has("residual"),
        "HAS_NORM": given.eps is not None,
        "HAS_NORM_WEIGHT": has("norm_weight"),
        "EPS": given.eps or 0.0,
        "OFFSET": given.offset,
        "HAS_B": has("b"),
        "GATED": given.gated,
        "ROUTED_SCALE": given.routed_scale,
        "SCALE": given.scale,
        "HAS_POST": given.post_eps is not None,
        "HAS_POST_WEIGHT": has("post_norm_weight"),
        "POST_EPS": given.post_eps or 0.0,
        "POST_OFFSET": given.post_offset,
        "WIDE": wide,
        "NARROW": x is None and h * rows["a"].element_size() >= NARROW_FROM,
        "PRECISE": given.result_dtype() == torch.float32,
        "INTERPRETED": INTERPRETED,
        "DEPENDENT": dependent,
        "GROUP": in_flight,
        "VECTOR": vector([*starts, h], itemsize),
        "K": k,
        "H": h,
        "BLOCK_K": block_k,
        "BLOCK_H": block_h,
    }
    return numbers, warps


def _launch(rows: dict[str, Tensor | None], count: int, given: Arguments) -> Launch:
    device = rows["a"].get_device()
    dependent = dependent_launch(device)
    numbers, warps = numbers_of(rows, given, dependent)
    arguments = in_order(moe_combine_kernel, (*OPERANDS, *RESULTS), numbers)
    dtypes = [given.result_dtype(), *(None if t is None else t.dtype for t in rows.values())]
    options = {"num_warps": warps, "launch_pdl": True} if dependent else {"num_warps": warps}
    return Launch(moe_combine_kernel, device, count, arguments, (*dtypes, *arguments), **options)


def without_columns(given: Arguments) -> Arguments:
    """The arguments if x has no columns, since the kernel does not compile then: the logit is the bias, or zero."""
    gate = constant_logit(given.gate_bias, given.x, given.b.shape[:-1])
    return given._replace(gate=gate, x=None, gate_weight=None, gate_bias=None)


_known = Calls()


def moe_combine(given: Arguments) -> tuple[Tensor, Tensor]:
    """The sum and the normed sum, new and contiguous. Without `eps` the normed sum is an empty tensor.

    Raises:
        RuntimeError: outside the op's contract. It is checked on the first call with these layouts only.
    """
    operands = operands_of(given)
    key = layouts(*operands), given[TENSORS:]
    call = _known.get(key)
    if call is None:
        check_moe_combine(given)
        if given.x is not None and given.x.shape[-1] == 0:
            return moe_combine(without_columns(given._replace(dtype=given.result_dtype())))
        call = _known.keep(key, _Prepared(given))
    return call(operands)


def traced(given: Arguments) -> tuple[Tensor, Tensor] | None:
    """The same for a tracer, such as Inductor's: allocations and a launch that it sees. The contract has been checked.

    None if something else than the number of rows is not known as a number, or if there may be no rows.
    """
    given = given._replace(dtype=given.result_dtype())
    if given.x is not None and known(given.x.shape[-1] == 0):
        given = without_columns(given)
    if not known(given.a.numel() > 0):
        return None
    rows = rows_of(given)
    columns = [tensor.shape[-1] for tensor in (given.a, given.x) if tensor is not None]
    strides = [stride for tensor in rows.values() if tensor is not None for stride in tensor.stride()]
    if not all(isinstance(n, int) for n in (*columns, *strides)):
        return None
    shape, device = given.shape(), given.a.device
    total = torch.empty(shape, dtype=given.dtype, device=device)
    normed = torch.empty((0,) if given.eps is None else shape, dtype=given.dtype, device=device)
    numbers, warps = numbers_of(rows, given, dependent=False)
    # What is absent is None, a constant: Inductor's code does not pass it.
    numbers |= {step: None for step, (name, _) in STEPS.items() if rows[name] is None}
    if rows["gate_weight"] is None:
        numbers["w_col"] = None
    pointers = {name: rows[operand] for name, operand in OPERANDS.items()}
    pointers |= zip(RESULTS, (total, None if given.eps is None else normed), strict=True)
    launch = torch.library.wrap_triton(moe_combine_kernel)[(prod(shape[:-1]),)]
    launch(**pointers, **numbers, num_warps=warps)
    return total, normed
