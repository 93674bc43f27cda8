"""Inputs and programs of the trap table: all that a row's program, which is a string, can name is in this module."""

import textwrap
from collections.abc import Callable

import torch
import torch.nn.functional as F
from programs import DEVICE, operands

S = torch.sigmoid
BF16, F16, F32, F64, I64 = torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64
T, H = 4, 8


def of(a=(T, H), b=(T, H), g=(T, 1), dtype=F32, grad=False) -> Callable[[], list[torch.Tensor]]:
    """Makes a, b and g; `dtype` is one for all, or one each."""
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,) * 3

    def made():
        found = [tensor.to(kind) for tensor, kind in zip(operands(a, b, g), dtypes, strict=True)]
        return [tensor.requires_grad_() for tensor in found] if grad else found

    return made


def filled(a: float, b: float, g: float, dtype=F32, device=DEVICE) -> Callable[[], list[torch.Tensor]]:
    return lambda: [
        torch.full(shape, value, dtype=dtype, device=device) for shape, value in (((T, H), a), ((T, H), b), ((T, 1), g))
    ]


class Plain(torch.nn.Module):
    def __init__(self, *hooks):
        super().__init__()
        self.gate = torch.nn.Sigmoid()
        for hook in hooks:
            self.gate.register_forward_hook(hook)

    def forward(self, a, b, g):
        return a + self.gate(g) * b


class Counting(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = torch.nn.Parameter(torch.zeros(1, device=DEVICE), False)  # symbolic_trace knows no buffers

    def forward(self, a, b, g):
        m = S(g) * b
        self.calls.add_(1)
        return a + m


class Dropping(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, a, b, g):
        return a + self.drop(S(g) * b)


class Own(torch.autograd.Function):
    """Its backward is not the formula's, so that a rewrite that lost it would show."""

    @staticmethod
    def forward(ctx, a, b, g):
        return a + S(g) * b

    @staticmethod
    def backward(ctx, grad):
        return grad * 2, grad * 3, grad[:, :1] * 4


class Sub(torch.Tensor):
    """A subclass with no rule of its own: results keep the type."""

    def __deepcopy__(self, memo):
        return self.clone()


def formula(a, b, g):
    return a + S(g) * b


def no_grad_between(a, b, g):
    with torch.no_grad():
        m = S(g) * b
    return a + m


def projected(a, b, g):
    return a + S(F.linear(a, g.t())) * F.linear(a, b)


def autocast():
    return torch.autocast(DEVICE, BF16)


def autocast_inside(a, b, g):
    with autocast():
        return projected(a, b, g)


@torch.compiler.nested_compile_region
def region(a, b, g):
    return a + S(g) * b


def subclassed():
    a, b, g = of()()
    return [a.as_subclass(Sub), b, g]


def same_twice():
    a, _, g = of()()
    return [a, a, g]


def on_two_devices(shape):
    def made():
        a, b, g = of()()
        return [a.to("meta"), b.to("meta"), (g[:shape] if shape else g[0, 0]).cpu()]

    return made


def one_row_of_far_rows():
    a, b, g = of((2, H), (1, H), (1, 1))()
    return [torch.as_strided(a, (1, H), (999, 1)), b, g]


def sparse(which):
    return lambda: [
        tensor.to_sparse() if name in which else tensor for name, tensor in zip("abg", of(g=(T, H))(), strict=True)
    ]


def built(program: str | Callable) -> Callable:
    if not isinstance(program, str):
        return program
    scope = dict(globals())
    exec(f"def program(a, b, g):\n{textwrap.indent(program, '    ')}\n", scope)
    return scope["program"]
