"""Ops of a user's own that bear the names of torch's: a name says nothing of what is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def _define(name: str, forward: Callable[..., Tensor], backward: Callable[..., Sequence[Tensor]]) -> None:
    """`fuzzlib::name`, functional, with a fake and a backward; backward(grad, *inputs) gives one gradient per input."""
    arguments = ", ".join(f"Tensor x{i}" for i in range(forward.__code__.co_argcount))
    op = torch.library.custom_op(f"fuzzlib::{name}", forward, mutates_args=(), schema=f"({arguments}) -> Tensor")
    op.register_fake(lambda *inputs: torch.empty_like(forward(*inputs)))
    op.register_autograd(
        lambda ctx, grad: tuple(backward(grad, *ctx.saved_tensors)),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )


# What each does is not what torch's op of the name does; each result is fresh memory, as a custom op's has to be.
_define("half", lambda x: x * 0.5, lambda grad, x: [grad * 0.5])
_define("to", lambda x: -x, lambda grad, x: [-grad])
_define("view", lambda x: x.flip(0), lambda grad, x: [grad.flip(0)])
_define("flatten", lambda x: x.flip(0) * 1, lambda grad, x: [grad.flip(0)])
_define("contiguous", lambda x: x * 3, lambda grad, x: [grad * 3])
_define("clone", lambda x: x + 1, lambda grad, x: [grad * 1])
_define("expand", lambda x: x * 2, lambda grad, x: [grad * 2])
_define("sigmoid", lambda x: x.tanh(), lambda grad, x: [grad * (1 - x.tanh().square())])
_define("pow", lambda x: x.sin(), lambda grad, x: [grad * x.cos()])
_define("rsqrt", lambda x: x.cos(), lambda grad, x: [-grad * x.sin()])
_define("sum", lambda x: x.amax(1) * 1, lambda grad, x: [grad[:, None] * (x == x.amax(1, True))])
_define("add", lambda x, y: x - y, lambda grad, x, y: [grad * 1, -grad])
_define(
    "mul", lambda x, y: x * y + 1, lambda grad, x, y: [(grad * y).sum_to_size(x.shape), (grad * x).sum_to_size(y.shape)]
)
_define("linear", lambda x, y: x @ y.t() + 1, lambda grad, x, y: [grad @ y, grad.t() @ x])
_define(
    "index", lambda x, i: x[i.flip(0)], lambda grad, x, i: [torch.zeros_like(x).index_add(0, i.flip(0), grad), None]
)


@torch.library.custom_op("fuzzlib::fill", mutates_args=("x",))
def fill(x: Tensor) -> None:
    """Writes its argument, whatever its name and without an underscore."""
    x.mul_(0.5)


@torch.library.custom_op("fuzzlib::relu_", mutates_args=("y",))
def relu_(x: Tensor, y: Tensor) -> Tensor:
    """Writes its second argument, and not the first, as the name would have it."""
    y.add_(1)
    return x * 2


@relu_.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(x * 2)


@torch._dynamo.allow_in_graph
def reshape(x: Tensor) -> Tensor:
    """A plain function that tracers keep as a call."""
    return x.flip(0)


@torch._dynamo.allow_in_graph
def detach(x: Tensor) -> Tensor:
    """Another one: it writes what it is given."""
    return x.mul_(0.5)
