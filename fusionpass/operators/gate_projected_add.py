"""fusionpass::gate_projected_add: y = a + sigmoid(x . weight + bias) * b"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from fusionpass.graph.tensors import known_contiguous
from fusionpass.kernels import gate_projected_add_aten as aten
from fusionpass.kernels.contract import MOST_COLUMNS, result_dtype
from fusionpass.kernels.moe_combine_aten import Arguments
from fusionpass.operators.autocast import cast, without_autocast
from fusionpass.operators.declaration import Bench, Op
from fusionpass.operators.dispatch import Beneath, beneath, plain, recorded, run_of, transforms_active
from fusionpass.operators.implementations import ALL, Dtype, kernel_dtypes, kernels_take
from fusionpass.private import _DisableAutocast


@functools.cache
def kernel():
    """Imports Triton, so it is called only when a tensor arrives that the kernel takes."""
    from fusionpass.kernels import gate_projected_add

    return gate_projected_add


@functools.cache
def backward_kernel():
    from fusionpass.kernels import gate_projected_add_backward

    return gate_projected_add_backward


@functools.cache
def combine_kernel():
    from fusionpass.kernels import moe_combine

    return moe_combine


def run(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *, dtype: Dtype = None) -> Tensor:
    if kernels_take(x, weight, bias, a, b, dtype=dtype):
        return kernel().gate_projected_add(x, weight, bias, a, b, dtype)
    aten.check_gate_projected_add(x, weight, bias, a, b, dtype)
    return aten.gate_projected_add(x, weight, bias, a, b, dtype)


def fake(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *, dtype: Dtype = None) -> Tensor:
    aten.check_gate_projected_add(x, weight, bias, a, b, dtype)
    return (a + torch.sigmoid(a.new_empty((*a.shape[:-1], 1))) * b).to(result_dtype(dtype, x, a, b))


def direct(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *, dtype: Dtype = None) -> Tensor:
    """`torch.ops.fusionpass.gate_projected_add`."""
    if plain(x, weight, bias, a, b) and (kernel_dtypes(a) is ALL or kernels_take(x, weight, bias, a, b, dtype=dtype)):
        if recorded(x, weight, bias, a, b):
            return _GateProjectedAdd.apply(run_of, dtype, x, weight, bias, a, b)[0]
        return kernel().gate_projected_add(x, weight, bias, a, b, dtype)
    return OP.overload(x, weight, bias, a, b, dtype=dtype)


def under_autograd(
    keyset, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *, dtype: Dtype = None
) -> Tensor:
    if transforms_active():
        aten.check_gate_projected_add(x, weight, bias, a, b, dtype)
        return aten.gate_projected_add_expression(x, weight, bias, a, b, dtype)
    if recorded(x, weight, bias, a, b):
        return _GateProjectedAdd.apply(beneath(keyset), dtype, x, weight, bias, a, b)[0]
    return beneath(keyset)(OP)(x, weight, bias, a, b, dtype=dtype)


class _GateProjectedAdd(torch.autograd.Function):
    """(y, logit). It saves what the unfused nodes save, but the logit instead of its sigmoid.

    The logit is a result because a second derivative goes through it too.
    """

    @staticmethod
    def forward(ctx, computed: Beneath, dtype, x, weight, bias, a, b):
        need_x, need_weight, need_bias, _, need_b = ctx.needs_input_grad[2:]
        need_logit = need_x or need_weight or need_bias
        ctx.set_materialize_grads(False)
        ctx.rows, ctx.dtypes = x.shape[:-1], (a.dtype, b.dtype)
        ctx.shapes = weight.shape, None if bias is None else bias.shape
        if not (need_logit or need_b):
            return computed(OP)(x, weight, bias, a, b, dtype=dtype), None
        y, logit = computed(AND_LOGIT)(x, weight, bias, a, b, dtype=dtype)
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None, logit, b if need_logit else None)
        return y, logit

    @staticmethod
    @without_autocast
    def backward(ctx, dy, dlogit):
        need_x, need_weight, need_bias, need_a, need_b = needs = ctx.needs_input_grad[2:]
        if not (need_x or need_weight or need_bias or need_b):
            return None, None, None, None, None, None if dy is None else dy.to(ctx.dtypes[0]), None
        x, weight, logit, b = ctx.saved_tensors
        if need_x and need_b and dy is not None and dlogit is None and not torch.is_grad_enabled():
            dx, dweight, dbias, db = BACKWARD.overload(dy, x, weight, logit, b, ctx.rows, need_bias)
            da = dy.to(ctx.dtypes[0]) if need_a else None
        else:
            gradients = aten.gate_projected_add_gradients(dy, dlogit, x, weight, logit, b, needs, ctx.dtypes)
            dx, dweight, dbias, da, db = gradients
            dx = None if dx is None else dx.reshape(*ctx.rows, dx.shape[-1])
        weight_shape, bias_shape = ctx.shapes
        dweight = dweight.reshape(weight_shape) if need_weight else None
        return None, None, dx, dweight, dbias.reshape(bias_shape) if need_bias else None, da, db


def under_autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *, dtype: Dtype = None
) -> Tensor:
    """`linear` computes in autocast's dtype: x, weight and bias are cast to it."""
    if weight.dim() > 1 or a.device.type != "cpu" or x.dtype != weight.dtype:  # autocast on a CPU does not change `mv`
        x, weight, bias = map(cast, (x, weight, bias))
    with _DisableAutocast():
        return OP.overload(x, weight, bias, a, b, dtype=dtype)


def under_inductor(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *, dtype: Dtype = None
) -> Tensor | None:
    """A launch of moe_combine's kernel, which computes whole rows, into contiguous results."""
    aten.check_gate_projected_add(x, weight, bias, a, b, dtype)
    if not kernels_take(a, x, weight, bias, b, dtype=dtype):
        return aten.gate_projected_add_expression(x, weight, bias, a, b, dtype)
    columns = a.shape[-1]
    if not (known_contiguous(a) and known_contiguous(b) and isinstance(columns, int) and columns <= MOST_COLUMNS):
        return None  # the result would not have eager's layout, or a row is too long for one program
    final = result_dtype(dtype, x, a, b)
    results = combine_kernel().traced(Arguments(a, b, x=x, gate_weight=weight, gate_bias=bias, dtype=final))
    return None if results is None else results[0]


def launches() -> list:
    return [combine_kernel().moe_combine_kernel]


# Its other forms: the op with the logit, which its gradients need, and the gradients.


def run_and_logit(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *, dtype: Dtype = None
) -> tuple[Tensor, Tensor]:
    if kernels_take(x, weight, bias, a, b, dtype=dtype):
        return kernel().gate_projected_add_and_logit(x, weight, bias, a, b, dtype)
    aten.check_gate_projected_add(x, weight, bias, a, b, dtype)
    return aten.gate_projected_add_and_logit(x, weight, bias, a, b, dtype)


def fake_and_logit(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *, dtype: Dtype = None
) -> tuple[Tensor, Tensor]:
    return fake(x, weight, bias, a, b, dtype=dtype), x.new_empty((*a.shape[:-1], 1))


def run_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor, logit: Tensor, b: Tensor, rows: Sequence[int], need_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    operands = dy, x, weight, logit, b
    if kernels_take(*operands) and backward_kernel().fits(*operands):
        return _all_tensors(*backward_kernel().gradients(*operands, rows, need_bias))
    return backward_in_aten(*operands, rows, need_bias)


def backward_in_aten(
    dy: Tensor, x: Tensor | None, weight: Tensor, logit: Tensor, b: Tensor, rows: Sequence[int], need_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs = True, x is not None, need_bias, False, True
    dtypes = dy.dtype, b.dtype
    dx, dweight, dbias, _, db = aten.gate_projected_add_gradients(dy, None, x, weight, logit, b, needs, dtypes)
    return _all_tensors(dx.reshape(*rows, weight.numel()).contiguous(), dweight, dbias, db)


def _all_tensors(
    dx: Tensor, dweight: Tensor | None, dbias: Tensor | None, db: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An op has no optional results. A result that was not asked for is an empty tensor."""
    return dx, dx.new_empty(0) if dweight is None else dweight, dx.new_empty(0) if dbias is None else dbias, db


# In the benchmark.


def _expression(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    gate = linear(x, weight)
    return a + torch.sigmoid(gate) * b


def _here(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.fusionpass.gate_projected_add(x, weight, None, a, b)


def _shapes(t: int, h: int) -> dict[str, tuple[int, int]]:
    return {"x": (t, h), "weight": (1, h), "a": (t, h), "b": (t, h)}


FORWARD_BENCH = Bench(
    _expression,
    _here,
    _shapes,
    reads=lambda t, h: 3 * t * h + h,  # x, a, b, weight
    writes=lambda t, h: t * h,
)
BACKWARD_BENCH = Bench(
    _expression,
    _here,
    _shapes,
    reads=lambda t, h: 3 * t * h + t + h,  # dy, b, x, logit, weight
    writes=lambda t, h: 2 * t * h + h,  # db, dx, dweight; da is dy itself
    backward=True,
)

OP = Op(
    "gate_projected_add(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, *, ScalarType? dtype=None) -> Tensor",
    run=run,
    fake=fake,
    autograd=under_autograd,
    autocast=under_autocast,
    inductor=under_inductor,
    launches=launches,
    direct=direct,
    bench={"gate_projected_add": FORWARD_BENCH, "gate_projected_add_backward": BACKWARD_BENCH},
)
AND_LOGIT = Op(
    "_gate_projected_add_and_logit(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, *, ScalarType? dtype=None) "
    "-> (Tensor, Tensor)",
    run=run_and_logit,
    fake=fake_and_logit,
)
BACKWARD = Op(
    "_gate_projected_add_backward(Tensor dy, Tensor? x, Tensor weight, Tensor logit, Tensor b, SymInt[] rows, "
    "bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    run=run_backward,
    fake=backward_in_aten,
)
OPS = (OP, AND_LOGIT, BACKWARD)
