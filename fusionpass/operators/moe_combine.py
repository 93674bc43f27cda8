"""fusionpass::moe_combine: the combine region of a sparse layer, (sum, normed)

sum    = residual + post_norm(scale * (routed_scale * routed + sigmoid(gate) * b))
routed = a, or sum_k topk_weights[t, k] * a[inverse[t, k]]; without a gate b is added as it is, if there is a b
normed = rms_norm(sum)                                 gate as it is given, or x . gate_weight + gate_bias
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fusionpass.kernels import moe_combine_aten as aten
from fusionpass.kernels.contract import result_dtype
from fusionpass.kernels.gate_projected_add_aten import projected_nodes
from fusionpass.kernels.gated_add_aten import gated_nodes
from fusionpass.kernels.moe_combine_aten import TENSORS, Arguments
from fusionpass.operators import gate_projected_add, gated_add
from fusionpass.operators.autocast import cast, without_autocast
from fusionpass.operators.declaration import Op, schema_of
from fusionpass.operators.dispatch import beneath, plain, recorded, transforms_active
from fusionpass.operators.implementations import ALL, kernel_dtypes, kernels_take
from fusionpass.operators.moe_combine_bench import CASES
from fusionpass.private import _DisableAutocast


@functools.cache
def kernel():
    """Imports Triton, so it is called only when a tensor arrives that the kernel takes."""
    from fusionpass.kernels import moe_combine

    return moe_combine


def run(*args, **options) -> tuple[Tensor, Tensor]:
    given = Arguments(*args, **options)
    if kernels_take(*given[:TENSORS], dtype=given.dtype):
        return kernel().moe_combine(given)
    aten.check_moe_combine(given)
    return aten.moe_combine_expression(given)


def fake(*args, **options) -> tuple[Tensor, Tensor]:
    given = Arguments(*args, **options)
    aten.check_moe_combine(given)
    shape, dtype = given.shape(), given.result_dtype()
    return given.a.new_empty(shape, dtype=dtype), given.a.new_empty((0,) if given.eps is None else shape, dtype=dtype)


def direct(*args, **options) -> tuple[Tensor, Tensor]:
    """`torch.ops.fusionpass.moe_combine`."""
    given = Arguments(*args, **options)
    tensors = given[:TENSORS]
    taken = plain(*tensors) and (kernel_dtypes(given.a) is ALL or kernels_take(*tensors, dtype=given.dtype))
    if taken and not recorded(*tensors):
        return kernel().moe_combine(given)
    return OP.overload(*args, **options)


def under_autograd(keyset, *args, **options) -> tuple[Tensor, Tensor]:
    """It has no backward of its own. If gradients are recorded, it is computed step by step."""
    transformed = transforms_active()
    tensors = (value for value in (*args, *options.values()) if isinstance(value, Tensor))
    if not (transformed or recorded(*tensors)):
        return beneath(keyset)(OP)(*args, **options)
    given = Arguments(*args, **options)
    aten.check_moe_combine(given)
    return aten.moe_combine_expression(given) if transformed else _differentiated(given)


def _differentiated(given: Arguments) -> tuple[Tensor, Tensor]:
    """Computed by ops that have gradients. They save no more than the nodes that the op replaces, and do not round more
    often."""
    final = given.result_dtype()
    of_core = final if given.residual is None else result_dtype(None, given.a, given.b, given.gate, given.x)

    def projected(x, weight, bias, a, b):
        return gate_projected_add.OP.overload(x, weight, bias, a, b, dtype=of_core)

    def gated(a, gate, b):
        return gated_add.OP.overload(a, gate, b, dtype=of_core)

    def norm(total, weight, eps, offset):
        # Eager's cast to float32 is a copy too, so a later write to the sum does not change the gradients.
        return _RmsNorm.apply(total if total.dtype == torch.float32 else total.clone(), weight, eps, offset)

    return aten.moe_combine_steps(given._replace(dtype=final), projected=projected, gated=gated, norm=norm)


class _RmsNorm(torch.autograd.Function):
    """It saves only the rows and the weight. It computes again what else its gradients need."""

    @staticmethod
    def forward(ctx, total, weight, eps, offset):
        ctx.options = eps, offset
        ctx.save_for_backward(total, weight)
        return aten.norm_nodes(total, weight, eps, offset).to(total.dtype)

    @staticmethod
    @without_autocast
    def backward(ctx, dy):
        gradients = aten.rms_norm_gradients(dy, *ctx.saved_tensors, *ctx.options, ctx.needs_input_grad[:2])
        return *gradients, None, None


def under_autocast(*args, **options) -> tuple[Tensor, Tensor]:
    """The projection computes in autocast's dtype. If no `dtype` was given, the graph was traced without autocast. Then
    autocast decides the dtype of each node in turn, so the nodes themselves are computed."""
    given = Arguments(*args, **options)
    if given.dtype is None:
        aten.check_moe_combine(given)
        return aten.moe_combine_steps(given, projected=projected_nodes, gated=gated_nodes, norm=aten.norm_nodes)
    options |= {name: cast(getattr(given, name)) for name in ("x", "gate_weight", "gate_bias")}
    with _DisableAutocast():
        return OP.overload(*args, **options)


def under_inductor(*args, **options) -> tuple[Tensor, Tensor] | None:
    given = Arguments(*args, **options)
    aten.check_moe_combine(given)
    if not kernels_take(*given[:TENSORS], dtype=given.dtype):
        return aten.moe_combine_expression(given)
    return kernel().traced(given)


def launches() -> list:
    return [kernel().moe_combine_kernel]


OP = Op(
    f"moe_combine({schema_of(Arguments, positional=('a', 'b'))}) -> (Tensor, Tensor)",
    run=run,
    fake=fake,
    autograd=under_autograd,
    autocast=under_autocast,
    inductor=under_inductor,
    launches=launches,
    direct=direct,
    bench=CASES,
)
OPS = (OP,)
