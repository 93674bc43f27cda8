"""`gated_add`, the function for people, and what holds for all registered ops, `torch.ops.fusionpass.*`.

`fusionpass.operators` lists them. All but `_gated_add_out` are functional: fresh results, no aliasing, no mutation. The
results of `gated_add` and `gate_projected_add` have the shape and strides of the eager expression
`a + torch.sigmoid(gate) * b`, for any layout of the operands. The results of `moe_combine` are contiguous.

Dtypes: each operand is bfloat16, float16 or float32. But x, weight and bias have one dtype, and with numerics="eager" all
operands have. The ops compute in float32 and round once to `dtype`. Its default, None, means the dtype that promotion gives
the eager expression, from a, b, the gate (or x) and the residual. The routing weights and the norm's weight do not count:
bfloat16 rows with float32 weights give bfloat16 results. Both results of `moe_combine` have the same dtype.

Devices: CUDA has the Triton kernels (`implementations.kernel_dtypes` says for which dtypes). Any other device computes in
ATen. Under autocast an op does what its nodes do there: see `under_autocast` in `fusionpass.operators`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusionpass.kernels import aliasing, contract
from fusionpass.operators.dispatch import PLAIN, transforms_active
from fusionpass.operators.gated_add import INTO, OP

__all__ = ["gated_add"]


def gated_add(a: Tensor, gate: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """a + sigmoid(gate) * b in one pass over memory.

    Args:
        a: `[..., H]`, bfloat16, float16 or float32, on any device; any strides.
        gate: `[...]` or `[..., 1]`, one logit per row, or `[..., H]`, one per element; dtype and device of `a`. The number
            of dims and the sizes say which of these it is, never the number of elements.
        b: as `a`.
        out: where to write: shape, dtype and device of `a`, any strides that give each element its own memory. `out=a`
            works in place. It may lie in the memory of an input in two cases: it is the same view as `a`, `b` or an
            `[..., H]` gate, or the two provably have no element in common, such as two halves of one `[T, 2 * H]` buffer.

    Returns:
        `out` if it was given, else a new tensor with the strides of `a + torch.sigmoid(gate) * b`.

    Numerics: computed in fp32 and rounded once to the dtype, where the eager expression rounds three times. inf, nan
    and -0.0 behave as in the expression. Differentiable in all three inputs unless `out` is given.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype, device or layout is none of the above; `out` has elements that share memory, overlaps
            an input, or is used where autograd records. The message names the argument; `out` is untouched.

    >>> import torch
    >>> a, b = torch.ones(2, 3), torch.ones(2, 3)
    >>> gated_add(a, torch.zeros(2), b)
    tensor([[1.5000, 1.5000, 1.5000],
            [1.5000, 1.5000, 1.5000]])
    >>> gated_add(a, torch.zeros(2, 1), b, out=a) is a
    True
    """
    named = {"a": a, "gate": gate, "b": b} if out is None else {"a": a, "gate": gate, "b": b, "out": out}
    _check_public(named)
    if gate.dim() < a.dim():
        gate = gate.unsqueeze(-1)
    if out is None:
        return OP.overload(a, gate, b)
    if torch.is_grad_enabled() and any(t.requires_grad for t in named.values()):
        raise ValueError("gated_add: out does not record gradients and an argument requires them; use out=None")
    if transforms_active():
        raise ValueError("gated_add: out carries no derivative through torch.func or forward-mode AD; use out=None")
    # A tracer's tensors have no address to compare. And a tracer turns this copy into a plain write of the result.
    if torch.compiler.is_compiling() or out.is_meta or any(type(t) not in PLAIN for t in named.values()):
        return out.copy_(OP.overload(a, gate, b))
    if aliasing.overlaps_itself(out):
        given = f"shape {contract.listed(out.shape)} and strides {contract.listed(out.stride())}"
        raise ValueError(f"gated_add: out has {given}, allowed: strides that give each element its own memory")
    for name, tensor in (("a", a), ("gate", gate), ("b", b)):
        if not (aliasing.same_view(out, tensor) or aliasing.disjoint(out, tensor)):
            allowed = "the very same view, or no element in common"
            raise ValueError(f"gated_add: out shares memory with {name}, allowed: {allowed}")
    INTO.overload(a, gate, b, out)
    return out


def _check_public(named: dict[str, Tensor]) -> None:
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"gated_add: {name} is {type(tensor).__name__}, allowed: torch.Tensor")
        if tensor.layout != torch.strided:
            raise ValueError(f"gated_add: {name} has layout {tensor.layout}, allowed: torch.strided")
    a, gate = named["a"], named["gate"]
    problem = contract.kind_problem(named) or contract.one_dtype_problem(named)
    if problem is None and a.dim() == 0:
        problem = "a has no dims, allowed: one or more"
    for name in ("b", "out"):
        if problem is None and name in named and named[name].shape != a.shape:
            problem = f"{name} is {contract.listed(named[name].shape)}, allowed: {contract.listed(a.shape)} as a"
    if problem is None:
        rows, per_row = a.shape[:-1], gate.dim() == a.dim() - 1
        fits = gate.shape == rows if per_row else gate.dim() == a.dim() and gate.shape in ((*rows, 1), a.shape)
        if not fits:
            allowed = (rows, (*rows, 1), a.shape)
            allowed = " or ".join(map(contract.listed, allowed))
            problem = f"gate is {contract.listed(gate.shape)}, allowed: {allowed} for a {contract.listed(a.shape)}"
    if problem is not None:
        raise ValueError(f"gated_add: {problem}")
