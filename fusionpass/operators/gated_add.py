"""fusionpass::gated_add: y = a + sigmoid(gate) * b"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fusionpass.kernels import gated_add_aten as aten
from fusionpass.kernels.contract import result_dtype
from fusionpass.operators.autocast import without_autocast
from fusionpass.operators.declaration import Bench, Op
from fusionpass.operators.dispatch import Beneath, beneath, plain, recorded, run_of, transforms_active
from fusionpass.operators.implementations import ALL, Dtype, kernel_dtypes, kernels_take
from fusionpass.private import _DisableAutocast


@functools.cache
def kernel():
    """Imports Triton, so it is called only when a tensor arrives that the kernel takes."""
    from fusionpass.kernels import gated_add

    return gated_add


@functools.cache
def backward_kernel():
    from fusionpass.kernels import gated_add_backward

    return gated_add_backward


def run(a: Tensor, gate: Tensor, b: Tensor, *, numerics: str = "fp32", dtype: Dtype = None) -> Tensor:
    if kernels_take(a, gate, b, dtype=dtype):
        return kernel().gated_add(a, gate, b, numerics, dtype)
    aten.check_gated_add(a, gate, b, numerics, dtype)
    return aten.gated_add(a, gate, b, numerics, dtype)


def fake(a: Tensor, gate: Tensor, b: Tensor, *, numerics: str = "fp32", dtype: Dtype = None) -> Tensor:
    aten.check_gated_add(a, gate, b, numerics, dtype)
    return (a + torch.sigmoid(gate) * b).to(result_dtype(dtype, a, gate, b))


def direct(a: Tensor, gate: Tensor, b: Tensor, *, numerics: str = "fp32", dtype: Dtype = None) -> Tensor:
    """`torch.ops.fusionpass.gated_add`."""
    if plain(a, gate, b) and (kernel_dtypes(a) is ALL or kernels_take(a, gate, b, dtype=dtype)):
        if recorded(a, gate, b):
            return _differentiated(run_of, a, gate, b, numerics, dtype)
        return kernel().gated_add(a, gate, b, numerics, dtype)
    return OP.overload(a, gate, b, numerics=numerics, dtype=dtype)


def under_autograd(
    keyset, a: Tensor, gate: Tensor, b: Tensor, *, numerics: str = "fp32", dtype: Dtype = None
) -> Tensor:
    if transforms_active():
        aten.check_gated_add(a, gate, b, numerics, dtype)
        return aten.gated_add_expression(a, gate, b, numerics, dtype)
    if recorded(a, gate, b):
        return _differentiated(beneath(keyset), a, gate, b, numerics, dtype)
    return beneath(keyset)(OP)(a, gate, b, numerics=numerics, dtype=dtype)


def _differentiated(computed: Beneath, a: Tensor, gate: Tensor, b: Tensor, numerics: str, dtype: Dtype) -> Tensor:
    """The unfused nodes save the sigmoid, which has its own memory, so a later write to the gate does not change the
    gradients. The same holds here: a copy of the gate is saved, with the sigmoid's size and dtype."""
    if gate.requires_grad or b.requires_grad:
        gate = gate.clone()
    return _GatedAdd.apply(computed, numerics, dtype, a, gate, b)


class _GatedAdd(torch.autograd.Function):
    """`gate` is a copy of the caller's gate, if gradients read it."""

    @staticmethod
    def forward(ctx, computed, numerics, dtype, a, gate, b):
        ctx.numerics, ctx.dtypes = numerics, (a.dtype, b.dtype)
        _, need_gate, need_b = ctx.needs_input_grad[3:]
        ctx.save_for_backward(gate if need_gate or need_b else None, b if need_gate else None)
        return computed(OP)(a, gate, b, numerics=numerics, dtype=dtype)

    @staticmethod
    @without_autocast
    def backward(ctx, dy):
        gate, b = ctx.saved_tensors
        need_a, need_gate, need_b = needs = ctx.needs_input_grad[3:]
        # The backward op has no derivative. If one may be needed, ATen's ops are used.
        if need_gate and need_b and ctx.numerics == "fp32" and not torch.is_grad_enabled():
            dgate, db = BACKWARD.overload(dy, gate, b)
            return None, None, None, dy.to(ctx.dtypes[0]) if need_a else None, dgate, db
        return None, None, None, *aten.gated_add_gradients(dy, gate, b, ctx.numerics, needs, ctx.dtypes)


def under_autocast(a: Tensor, gate: Tensor, b: Tensor, *, numerics: str = "fp32", dtype: Dtype = None) -> Tensor:
    """Its nodes promote, as the op does."""
    if numerics == "eager" and dtype is None and not a.dtype == gate.dtype == b.dtype:
        # Autocast was switched on after the tracing. The op rounds to one dtype, but each node rounds to its own.
        return aten.gated_nodes(a, gate, b)
    with _DisableAutocast():
        return OP.overload(a, gate, b, numerics=numerics, dtype=dtype)


def under_inductor(a: Tensor, gate: Tensor, b: Tensor, *, numerics: str = "fp32", dtype: Dtype = None) -> Tensor | None:
    """The expression, because Inductor's kernel ties with ours, and neighbours can be fused into it."""
    if numerics != "fp32":  # Inductor would keep float32 where eager rounds, and its sigmoid gives other bits
        return None
    aten.check_gated_add(a, gate, b, numerics, dtype)
    return aten.gated_add_expression(a, gate, b, numerics, dtype)


# Its other forms: into given memory, and its gradients.


def run_into(a: Tensor, gate: Tensor, b: Tensor, out: Tensor) -> None:
    if kernels_take(a, gate, b, out):
        kernel().launch(out, a, gate, b, "fp32")
    else:
        aten.gated_add_into(out, a, gate, b)
    if not out.is_inference():
        # `out` has new contents. A graph that saved the old ones must refuse to use them.
        torch.autograd.graph.increment_version(out)


def run_backward(dy: Tensor, gate: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if kernels_take(dy, gate, b) and backward_kernel().fits(dy, gate, b):
        return backward_kernel().gradients(dy, gate, b)
    return backward_in_aten(dy, gate, b)


def backward_in_aten(dy: Tensor, gate: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    _, dgate, db = aten.gated_add_gradients(dy, gate, b, "fp32", (False, True, True), (dy.dtype, b.dtype))
    return dgate, db


# In the benchmark.


def _expression(a: Tensor, gate: Tensor, b: Tensor) -> Tensor:
    return a + torch.sigmoid(gate) * b


def _here(a: Tensor, gate: Tensor, b: Tensor) -> Tensor:
    return torch.ops.fusionpass.gated_add(a, gate, b)


def _add(a: Tensor, gate: Tensor, b: Tensor) -> Tensor:
    """The same bytes without the gate."""
    return torch.add(a, b)


def _shapes(t: int, h: int) -> dict[str, tuple[int, int]]:
    return {"a": (t, h), "gate": (t, 1), "b": (t, h)}


FORWARD_BENCH = Bench(
    _expression,
    _here,
    _shapes,
    reads=lambda t, h: 2 * t * h + t,  # a, b, gate
    writes=lambda t, h: t * h,
    beside={"add": _add},
)
BACKWARD_BENCH = Bench(
    _expression,
    _here,
    _shapes,
    reads=lambda t, h: 2 * t * h + t,  # dy, b, gate
    writes=lambda t, h: t * h + t,  # db, dgate; da is dy itself
    backward=True,
)

OP = Op(
    'gated_add(Tensor a, Tensor gate, Tensor b, *, str numerics="fp32", ScalarType? dtype=None) -> Tensor',
    run=run,
    fake=fake,
    autograd=under_autograd,
    autocast=under_autocast,
    inductor=under_inductor,
    direct=direct,
    bench={"gated_add": FORWARD_BENCH, "gated_add_backward": BACKWARD_BENCH},
)
INTO = Op(
    "_gated_add_out(Tensor a, Tensor gate, Tensor b, Tensor(a!) out) -> ()",
    run=run_into,
    fake=lambda a, gate, b, out: None,
)
BACKWARD = Op(
    "_gated_add_backward(Tensor dy, Tensor gate, Tensor b) -> (Tensor, Tensor)",
    run=run_backward,
    fake=backward_in_aten,
)
OPS = (OP, INTO, BACKWARD)
