"""What a naive matcher of `a + sigmoid(g) * b` gets wrong: 61 situations, and what each tracer's graph of them becomes.

Whether a site is rewritten or refused, the program has to behave as in eager: values, dtypes, shapes, strides, which
tensors share memory, what is written into the inputs, gradients, and what it raises.
"""

import copy
import math
import textwrap
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from programs import DEVICE, operands, tensors
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fusionpass

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


class Untraceable(NamedTuple):
    """The tracer by itself, without the pass, raises this."""

    error: type[Exception] | tuple[type[Exception], ...]


class Unlike(NamedTuple):
    """The tracer's own graph, before the pass, behaves otherwise than eager: the pass is held to that graph."""

    want: int | str


# Sites; or codes of the misses; or what eager raises; or None, where the tracer's graph cannot be run.
Want = int | str | type[Exception] | Untraceable | Unlike | None


class Trap(NamedTuple):
    number: int
    name: str
    program: str | Callable  # the body of program(a, b, g)
    want: Want  # of Dynamo's graph
    inputs: Callable[[], list] = of()
    others: dict[str, Want] = {}  # of an entry point that sees another graph
    around: Callable = nullcontext


TRACERS = ("export", "make_fx", "symbolic_trace")
# symbolic_trace writes `a += m` down as add, and `b *= m` as mul: nothing in place is left to see. It knows no autocast.
ADDS = {"symbolic_trace": Unlike(1)}
PROMOTES = {"symbolic_trace": Unlike("mixed-dtype")}
GROWS = {"symbolic_trace": Unlike("shape")}
NO_ITEM = {"symbolic_trace": Untraceable(TypeError)}
MULTI = {"symbolic_trace": Unlike("multi-use")}
COND = {"symbolic_trace": Untraceable(RuntimeError)}
# That one element with many addresses may not be written, fake tensors do not say; AOT makes a sum of it.
EXPANDED = {"aot_eager": Unlike("in-place-visible"), **dict.fromkeys(("export", "make_fx"), "in-place-visible"), **ADDS}
# export makes a graph within the graph of what is inside no_grad; make_fx and symbolic_trace know no grad mode.
NO_GRAD = {"export": "", "make_fx": Unlike(1), **ADDS}
# Dynamo's sum reads the hook's node and not the product; the others lose the hook.
HOOK = {"export": Unlike(1), "make_fx": Unlike(1), "symbolic_trace": Untraceable(NotImplementedError)}
# A graph that is given says nothing of the inputs' type; aot_eager by itself cannot run this subclass.
SUBCLASS = {"aot_eager": Unlike("subclass"), "export": 1, "make_fx": 1}
# make_fx writes down what the transforms do, so no level is left; of grad, export keeps fake tensors as constants.
VMAP = {"make_fx": 1, "symbolic_trace": Untraceable(ValueError)}
GRAD = {"make_fx": 1, "export": None, "symbolic_trace": Untraceable(ValueError)}
JVP = {"make_fx": "multi-use", "symbolic_trace": Untraceable(RuntimeError)}
ATTRIBUTE = {"make_fx": Untraceable(AssertionError)}  # its fake tensors know no real ones
EINSUM = {"make_fx": "view-between"}  # it takes an einsum apart
REGION, OWN = dict.fromkeys(TRACERS, 2), dict.fromkeys(TRACERS, Unlike(1))
OLD = torch.__version__ < "2.12"
if (
    OLD
):  # export cannot trace the levels, and keeps a shared region once; Dynamo's body of a Function returns its product
    JVP["export"] = Untraceable(AssertionError)
    REGION["export"] = 1
    OWN |= dict.fromkeys(("eager", "aot_eager"), "multi-use")
NEW = torch.__version__ >= "2.14"
# There make_fx records a detach as an alias: gradients flow through its graph, and through ours as well.
DETACHED = {"make_fx": Unlike(1)} if NEW else {}
# The same numbers whatever the dtype of a and b.
DRAWN = "m = S(g) * torch.rand_like(b, dtype=F32); return torch.rand_like(a, dtype=F32) + m"
ASSERTED = "s = S(g); m = s * b; torch._assert_async((s <= 1).all()); return a + m"
# Fake tensors do not fail an assertion; AOT loses it.
ASSERTS = {"aot_eager": Unlike(1), **dict.fromkeys(TRACERS, 1)}
# On a CPU make_fx sees the mask that a dropout multiplies by; on a GPU it is an op.
DROPPED = {"make_fx": "dropout-between" if DEVICE == "cuda" else "scaled"}

TRAPS = [
    Trap(1, "b written", "m = S(g) * b; b.zero_(); return a + m", "mutation-between"),
    # Inputs and attributes that share no memory may share some in a later call, so a write to one may hit all of them.
    Trap(2, "a written", "m = S(g) * b; a.mul_(2); return a + m", "mutation-between"),
    Trap(2, "a copy of a written", "a = a * 1; m = S(g) * b; a.mul_(2); return a + m", 1),
    Trap(2, "attribute written", Counting(), "mutation-between", of(), ATTRIBUTE),
    Trap(3, "both written", "m = S(g) * b; a.mul_(2); b.zero_(); return a + m", "mutation-between"),
    Trap(4, "g written", "s = S(g); g.add_(3); return a + s * b", "mutation-between"),
    Trap(5, "view", "m = S(g) * b; b.view(-1).mul_(0); return a + m", "mutation-between"),
    Trap(5, "setitem", "m = S(g) * b; b[0] = 0; return a + m", "mutation-between", of(), NO_ITEM),
    Trap(5, "out=", "m = S(g) * b; torch.mul(a, 2, out=b); return a + m", "mutation-between"),
    Trap(5, "copy_", "m = S(g) * b; b.copy_(a); return a + m", "mutation-between"),
    Trap(6, "sigmoid_", "s = g.sigmoid_(); return a + s * b", "in-place"),
    Trap(7, "imul", "b *= S(g); return a + b", "in-place", of(), ADDS),
    Trap(7, "imul on a copy", "b = b * 1; b *= S(g); return a + b", 1),
    Trap(7, "imul on a copy, old name", "b = b * 1; v = b[0]; b *= S(g); return a + b, v", "in-place", of(), ADDS),
    Trap(7, "imul on the sigmoid", "s = S(g); s *= b; return a + s", 1, of(g=(T, H))),
    Trap(7, "iadd on the product", "p = S(g) * b; p += a; return p", 1),
    Trap(7, "iadd on the product, old name", "p = S(g) * b; v = p[0]; p += a; return p, v", "multi-use", of(), MULTI),
    Trap(7, "iadd on the sum", "s = a + S(g) * b; s += b; return s", 1),
    Trap(7, "iadd on the sum, old name", "s = a + S(g) * b; v = s[0]; s += b; return s, v", 1, of(), ADDS),
    Trap(7, "iadd of the sum", "a += a + S(g) * b; return a", 1, of(), ADDS),
    Trap(7, "iadd of the sum, old name", "v = b[0]; b += a + S(g) * b; return b, v", 1, of(), ADDS),
    Trap(7, "iadd of the sum, a copy", "r = b * 2; v = r[0]; r += a + S(g) * b; return r, v", 1, of(), ADDS),
    Trap(8, "iadd on a view", "v = a[:, ::2]; v += S(g) * b; return v", "in-place-visible", of((T, 2 * H)), ADDS),
    Trap(9, "a read again", "return (a + S(g) * b) + a", 1),
    Trap(10, "add", "return a + S(g) * b", 1, of(dtype=(BF16, F32, F32))),
    Trap(10, "iadd", "a += S(g) * b; return a", "in-place-visible", of(dtype=(BF16, F32, F32)), ADDS),
    Trap(10, "iadd on a copy", "a = a * 1; a += S(g) * b; return a", 1, of(dtype=(BF16, F32, F32)), ADDS),
    Trap(10, "imul on a copy", "b = b * 1; b *= S(g); return a + b", 1, of(dtype=(BF16, BF16, F32)), ADDS),
    Trap(10, "iadd on the product", "p = S(g) * b; p += a; return p", 1, of(dtype=(F32, BF16, BF16)), ADDS),
    Trap(11, "iadd would grow", "a += S(g) * b; return a", RuntimeError, of((T, 1)), GROWS),
    Trap(11, "int iadd", "a += S(g) * b; return a", RuntimeError, of(dtype=(I64, F32, F32)), PROMOTES),
    Trap(12, "alpha", "return torch.add(a, S(g) * b, alpha=2)", "scaled"),
    Trap(12, "sub", "return a - S(g) * b", ""),
    Trap(12, "rsub", "return torch.rsub(a, S(g) * b)", ""),
    Trap(13, "fp32 g", formula, 1, of(dtype=(BF16, BF16, F32))),
    Trap(13, "fp32 a", formula, 1, of(dtype=(F32, BF16, BF16))),
    Trap(13, "fp32 b", formula, 1, of(dtype=(BF16, F32, BF16))),
    Trap(13, "fp16 and bf16", formula, 1, of(dtype=(F16, BF16, BF16))),
    Trap(13, "fp16 g", formula, 1, of(dtype=(BF16, BF16, F16))),
    Trap(13, "three dtypes", formula, 1, of(dtype=(F16, BF16, F32))),
    Trap(13, "fp32 g, backward", formula, 1, of(dtype=(BF16, BF16, F32), grad=True)),
    Trap(13, "fp64 a", formula, "mixed-dtype", of(dtype=(F64, F32, F32))),
    Trap(13, "fp64 g", formula, "mixed-dtype", of(dtype=(F32, F32, F64))),
    Trap(13, "int g", formula, "mixed-dtype", of(dtype=(F32, F32, I64))),
    Trap(14, "bf16", formula, 1, of((64, 256), (64, 256), (64, 1), BF16)),
    Trap(15, "0-d g", formula, "zero-dim", of(g=(), dtype=BF16)),
    Trap(15, "0-d fp32 g", formula, "mixed-dtype", of(g=(), dtype=(BF16, BF16, F32))),
    Trap(15, "0-d fp32 a", formula, "mixed-dtype", of((), dtype=(F32, BF16, BF16))),
    Trap(15, "0-d fp32 b", formula, "mixed-dtype", of(b=(), g=(T, H), dtype=(BF16, F32, BF16))),
    Trap(15, "[1] fp32 g", formula, 1, of(g=(1,), dtype=(BF16, BF16, F32))),
    Trap(16, "scalars", "return 1e-3 + 2 * S(b)", "scalar-operand"),
    Trap(17, "a [H]", formula, "shape", of((H,))),
    Trap(17, "a [1, H]", formula, "shape", of((1, H))),
    Trap(17, "a [T, 1]", formula, "shape", of((T, 1))),
    Trap(17, "a [2, 1, H]", formula, "shape", of((2, 1, H))),
    Trap(18, "b [T, 1]", "return a + S(g) * b[:, :1]", "shape", of(g=(T, H))),
    Trap(18, "b [H]", "return a + S(g) * b[0]", "shape", of(g=(T, H))),
    Trap(19, "g [n]", formula, 1, of((H, H), (H, H), (H,))),
    Trap(19, "g [n, 1]", formula, 1, of((H, H), (H, H), (H, 1))),
    Trap(20, "g [1, 1]", formula, 1, of((2, 3, H), (2, 3, H), (1, 1))),
    Trap(20, "g [B, 1, 1]", formula, 1, of((2, 3, H), (2, 3, H), (2, 1, 1))),
    Trap(20, "g [S, 1]", formula, 1, of((2, 3, H), (2, 3, H), (3, 1))),
    Trap(20, "g [H]", formula, 1, of((2, 3, H), (2, 3, H), (H,))),
    Trap(20, "g [1, S, 1]", formula, 1, of((2, 3, H), (2, 3, H), (1, 3, 1))),
    Trap(21, "a column", "return a + S(g[:, 5:6]) * b", 1, of(g=(T, 16))),
    Trap(21, "expanded", "return a + S(g.expand(4, 8)) * b", 1),
    Trap(22, "a, b transposed", "return a.t() + S(g) * b.t()", 1, of((H, T), (H, T))),
    Trap(22, "a transposed", "return a.t() + S(g) * b", 1, of((H, T))),
    Trap(22, "b transposed", "return a + S(g) * b.t()", 1, of(b=(H, T))),
    Trap(22, "b transposed, sum swapped", "return S(g) * b.t() + a", "stride", of(b=(H, T))),
    Trap(22, "view of it", "return (a.t() + S(g) * b).view(-1)", RuntimeError, of((H, T))),
    Trap(23, "flatten", "return a + (S(g) * b).flatten(-2)", "view-between", of((3, 16), (3, 2, 8), (3, 2, 1))),
    Trap(23, "view", "return a + (S(g) * b).view(-1, 8)", 1, of((6, H), (3, 2, H), (3, 2, 1))),
    Trap(23, "unsqueeze", "return a + (S(g) * b).unsqueeze(1)", 1, of((T, 1, H))),
    Trap(23, "reshape of a copy", "return a + (S(g) * b.t()).reshape(2, 2, 8)", 1, of((2, 2, H), (H, T))),
    Trap(23, "[..., None]", "return a + S(g)[..., None] * b", 1, of(g=(T,))),
    Trap(23, "view of the sigmoid", "return a + S(g).view(2, 2, 1) * b", 1, of((2, 2, H), (2, 2, H))),
    Trap(23, "reshape of the sigmoid", "return a + S(g).reshape(-1, 1) * b", 1, of(g=(2, 2))),
    Trap(23, "expand_as of the sigmoid", "return a + S(g).expand_as(b) * b", 1),
    Trap(23, "t of the sigmoid", "return a + S(g).t() * b", "view-between", of(g=(1, T))),
    Trap(23, "t", "return a + (S(g) * b).t()", "view-between", of((H, T))),
    Trap(23, "permute", "return a + (S(g) * b).permute(1, 0)", "view-between", of((H, H), (H, H), (H, H))),
    Trap(23, "view(dtype)", "return a + (S(g) * b).view(torch.int32)", "view-between"),
    Trap(24, "of the product", "return a + (S(g) * b).bfloat16()", "cast-between", of(dtype=(BF16, F32, F32))),
    Trap(24, "of the sigmoid", "return a + S(g).bfloat16() * b", "cast-between", of(dtype=(BF16, BF16, F32))),
    Trap(25, "long and bool", formula, "mixed-dtype", of(dtype=(I64, torch.bool, I64))),
    Trap(25, "complex b", formula, "mixed-dtype", of(dtype=(F32, torch.complex64, F32))),
    Trap(25, "double", formula, "dtype", of(dtype=F64)),
    Trap(25, "fp8", formula, NotImplementedError, of(dtype=torch.float8_e4m3fn), dict.fromkeys(TRACERS, "dtype")),
    Trap(26, "b is a sigmoid", "return a + S(g) * S(b)", 1),
    Trap(26, "both addends", "return S(g) * a + S(a) * b", 1),
    Trap(27, "silu", "return b * S(b) + a", 1),
    Trap(27, "a is b", "return b + S(g) * b", 1),
    Trap(28, "g in a", "a += S(a[:, :1]) * b; return a", "in-place-visible", of(), ADDS),
    Trap(28, "g in an a of its own", "a = a * 2; a += S(a[:, :1]) * b; return a", 1),
    Trap(29, "shifted", "v = a[1:]; v += S(g) * a[:-1]; return v", "in-place-visible", of((T + 1, H)), ADDS),
    Trap(30, "expanded a", "v = a.expand(4, 8); v += S(g) * b; return v", RuntimeError, of((1, H)), EXPANDED),
    Trap(31, "leaf", "a += S(g) * b; return a", RuntimeError, of(grad=True), ADDS),
    Trap(31, "owned", "a = a * 2; a += S(g) * b; return a", 1, of(grad=True)),
    Trap(32, "backward", formula, 1, of(grad=True)),
    Trap(33, "no_grad", no_grad_between, "state-change-between", of(grad=True), NO_GRAD),
    Trap(33, "detach", "return a + (S(g) * b).detach()", "view-between", of(grad=True), DETACHED),
    Trap(34, "tensor hook", "m = S(g) * b; m.register_hook(lambda d: d * 0); return a + m", "", of(grad=True), HOOK),
    Trap(34, "module hook", Plain(lambda *given: given[-1] * 2), "scaled", of(), {"symbolic_trace": "module-hook"}),
    Trap(35, "product read too", "s = S(g); m = s * b; return a + m, m, s.mean()", "multi-use"),
    Trap(35, "sigmoid read too", "s = S(g); return a + s * b, s.mean()", 1),
    Trap(36, "no-op casts", "return a.to(a.dtype) + (S(g) * b).contiguous().to(b.dtype)", 1),
    Trap(36, "written through", "m = S(g) * b; b.to(b.dtype).contiguous().zero_(); return a + m", "mutation-between"),
    Trap(37, "dropout", "return a + F.dropout(S(g) * b, 0.5, True)", "dropout-between", of(), DROPPED),
    Trap(37, "dropout off", "return a + F.dropout(S(g) * b, 0.5, False)", 1),
    Trap(37, "dropout of the sigmoid off", "return a + F.dropout(S(g), 0.5, False) * b", 1),
    Trap(37, "nn.Dropout", Dropping(), "dropout-between", of(), DROPPED),
    Trap(37, "nn.Dropout off", Dropping().eval(), 1, of(), {"symbolic_trace": "dropout-between"}),
    Trap(37, "two draws", DRAWN, 1),
    Trap(38, "0 * inf", formula, 1, filled(1, math.inf, -math.inf)),
    Trap(38, "0 * inf, underflow", formula, 1, filled(1, math.inf, -1000)),
    Trap(38, "-0.0", formula, 1, filled(-0.0, -0.0, -math.inf)),
    Trap(39, "fp16 underflow", formula, 1, filled(0, 65504, -18, F16)),
    Trap(40, "T = 0", formula, 1, of((0, H), (0, H), (0, 1))),
    Trap(41, "one row", formula, 1, one_row_of_far_rows),
    Trap(42, "hardsigmoid", "return a + F.hardsigmoid(g) * b", ""),
    Trap(42, "logsigmoid", "return a + F.logsigmoid(g) * b", ""),
    Trap(42, "sigmoid_backward", "return a + torch.ops.aten.sigmoid_backward(g, g) * b", ""),
    Trap(43, "expit", "return a + torch.special.expit(g) * b", 1),
    Trap(43, "method", "return a + g.sigmoid() * b", 1),
    Trap(43, "nn.Sigmoid", Plain(), 1),
    Trap(43, "swapped", "return b * S(g) + a", 1),
    Trap(43, "quotient", "return a + b / (1 + torch.exp(-g))", ""),
    Trap(43, "lerp", "return torch.lerp(a, b, S(g))", "other-form"),
    Trap(43, "glu", "return a + F.glu(torch.cat((b, g.expand(4, 8)), 1))", "other-form"),
    Trap(43, "einsum", "return a + torch.einsum('to,th->th', S(g), b)", "other-form", of(), EINSUM),
    Trap(43, "index_add", "return torch.index_add(a, 0, torch.arange(4, device=DEVICE), S(g) * b)", "other-form"),
    Trap(44, "value 1", "return torch.addcmul(a, S(g), b)", 1),
    Trap(44, "value 2", "return torch.addcmul(a, S(g), b, value=2)", "scaled"),
    Trap(45, "a is a subclass", formula, "subclass", subclassed, SUBCLASS),
    Trap(46, "vmap", "return torch.vmap(lambda a, b, g: a + S(g) * b)(a, b, g)", "functorch", of(), VMAP),
    Trap(46, "grad", "return torch.func.grad(lambda g: (a + S(g) * b).sum())(g)", "functorch", of(), GRAD),
    Trap(46, "jvp", "return torch.func.jvp(lambda g: a + S(g) * b, (g,), (g,))", "functorch", of(), JVP),
    Trap(47, "0-d cpu gate", formula, "zero-dim", on_two_devices(0)),
    Trap(47, "cpu gate", formula, RuntimeError, on_two_devices(T)),
    Trap(48, "autocast inside", autocast_inside, 1, of(b=(H, H), g=(H, 1)), ADDS),
    Trap(48, "autocast outside", projected, 1, of(b=(H, H), g=(H, 1)), {}, autocast),
    Trap(49, "left", "return (a + S(g) * b) + S(b) * a", 2, of(dtype=BF16)),
    Trap(49, "right", "return a + (S(g) * b + S(b) * a)", 1, of(dtype=BF16)),
    Trap(50, "2 * sigmoid", "return a + 2 * S(g) * b", "scaled"),
    Trap(50, "2 * b", "return a + b * 2 * S(g)", 1),
    Trap(50, "2 * the product", "return a + 2 * (S(g) * b)", "scaled"),
    Trap(50, "mask of the product", "return a + (S(g) * b) * (b > 0)", "scaled"),
    Trap(50, "mask of the sigmoid", "return a + (g > 0) * S(g) * b", "scaled"),
    Trap(50, "the product, in place", "p = S(g) * b; p *= 0.5; return a + p", "scaled"),
    Trap(51, "assert", ASSERTED, 1),
    # On a GPU a failed assert ends the process's use of it.
    Trap(51, "assert fails", ASSERTED, RuntimeError, filled(1, 1, math.nan, device="cpu"), ASSERTS),
    Trap(52, "old name", "c = a; a += S(g) * b; return a, c", "in-place-visible", of(), ADDS),
    Trap(53, "t_", "a = a * 1; m = S(g) * b; a.t_(); return a + m", "metadata-mutation", of((H, H), (H, H), (H, 1))),
    Trap(54, "sparse a", formula, RuntimeError, sparse("a")),
    Trap(54, "sparse g", formula, NotImplementedError, sparse("g")),
    Trap(54, "sparse b", formula, "", sparse("b"), dict.fromkeys(TRACERS, "layout")),
    Trap(55, "expanded a", "return a.expand(4, 8) + S(g) * b", 1, of((T, 1))),
    Trap(57, "one tensor twice", formula, 1, same_twice),
    Trap(60, "checkpoint", lambda a, b, g: checkpoint(formula, a, b, g, use_reentrant=False), 1, of(grad=True)),
    Trap(60, "cond", "return torch.cond(a.sum() > 0, formula, lambda a, b, g: b + S(g) * a, (a, b, g))", 2, of(), COND),
    Trap(60, "region, twice", "return region(region(a, b, g), b, g)", 1, of(), REGION),
    Trap(60, "autograd.Function", "return Own.apply(a, b, g)", 1, of(grad=True), OWN),
    Trap(60, "inference_mode", formula, 1, of(), {}, torch.inference_mode),
]

ALONE = {56, 58, 59, 61}  # in test_contexts.py
COMPILERS = ("eager", "aot_eager", "inductor")
ENTRIES = (*COMPILERS, *TRACERS)
INDUCTORS = {1, 8, 26, 37, 49}  # a C++ compilation each
DRAWN_ANEW = 37


class Program(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, a, b, g):
        return self.function(a, b, g)


def built(program: str | Callable) -> Callable:
    if not isinstance(program, str):
        return program
    scope = dict(globals())
    exec(f"def program(a, b, g):\n{textwrap.indent(program, '    ')}\n", scope)
    return scope["program"]


def traced(entry: str, program: Callable, args: list) -> Any:
    if entry == "export":
        return torch.export.export(Program(program), tuple(args), strict=False)
    if entry == "make_fx":
        return make_fx(program, tracing_mode="fake")(*args)
    return torch.fx.symbolic_trace(program)


def runnable(program: Any) -> Callable:
    return program.module() if isinstance(program, torch.export.ExportedProgram) else program


class Seen(NamedTuple):
    """All that a run can be told by: results and inputs afterwards, who shares memory with whom, gradients."""

    values: list[torch.Tensor]
    shared: list
    gradients: list


def copied(args: list) -> list:
    """Copies that share memory among each other, and are laid out, as the originals are."""
    return copy.deepcopy(args)


def seen(run: Callable, args: list, around: Callable = nullcontext) -> Seen:
    args = copied(args)
    torch.manual_seed(0)
    with around():
        results = tensors(run(*args))
    leaves = [arg for arg in args if arg.requires_grad]
    recorded = [result for result in results if result.requires_grad]
    gradients = []
    if leaves and recorded:
        weights = operands(*[result.shape for result in recorded], seed=1)
        total = sum((result * weight).sum() for result, weight in zip(recorded, weights, strict=True))
        gradients = list(torch.autograd.grad(total, leaves, allow_unused=True))
    values = [*results, *args]
    strided = [value for value in values if value.layout is torch.strided]
    memory = [value.untyped_storage()._cdata for value in strided]
    shared = [(memory.index(key), value.storage_offset()) for key, value in zip(memory, strided, strict=True)]
    return Seen(values, shared, gradients)


def assert_same(got: Seen, want: Seen, truth: Seen | None, computed_in: float = 0) -> None:
    """truth: None where the bits must be eager's; else the result in float64, to which it must be no farther than eager
    by more than a unit in the last place. computed_in: eps of the coarsest dtype that eager computes in."""
    assert got.shared == want.shared
    assert len(got.values) == len(want.values)
    numbers = [
        value[value.isfinite()] for value in want.values if truth and value.is_floating_point() and not value.is_meta
    ]
    scale = max((value.abs().max().double() for value in numbers if value.numel()), default=0)
    for index, (g, w) in enumerate(zip(got.values, want.values, strict=True)):
        assert (type(g), g.dtype, g.shape, g.layout) == (type(w), w.dtype, w.shape, w.layout)
        assert g.requires_grad == w.requires_grad
        assert w.layout is not torch.strided or g.stride() == w.stride()
        if w.is_meta:
            continue
        if truth is None or not w.is_floating_point() or not w.numel():
            torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)
            continue
        t, finite, zero = truth.values[index].double(), w.isfinite(), (w == 0) & (g == 0)
        torch.testing.assert_close(g[~finite], w[~finite], equal_nan=True)
        assert torch.equal(g[zero].signbit(), w[zero].signbit())
        g, w, t = g[finite].double(), w[finite].double(), t[finite]
        if t.numel():
            eps = torch.finfo(want.values[index].dtype).eps
            # or it would be no truth of this program
            assert (w - t).abs().max() <= 8 * max(eps, computed_in) * scale
            assert (g - t).abs().max() <= (w - t).abs().max() + eps * t.abs().max()
    assert [d is None for d in got.gradients] == [d is None for d in want.gradients]
    for g, w in zip(got.gradients, want.gradients, strict=True):
        torch.testing.assert_close(g, w)


def in_double(args: list) -> list:
    return [arg.detach().double() if arg.is_floating_point() else arg for arg in args]


def coarsest(trap: Trap, args: list) -> float:
    """Where dtypes are mixed, a result in the wider one was rounded to the others on its way."""
    dtypes = [arg.dtype for arg in args if arg.is_floating_point()]
    if trap.around is autocast or trap.program is autocast_inside:
        dtypes.append(BF16)
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=0)


def kind(want: Want) -> str:
    if want is None or isinstance(want, Untraceable):
        return "untraceable"
    if isinstance(want, type):
        return "raises"
    return "rewritten" if isinstance(want, int) else "refused" if want else "no near miss"


def wanted(trap: Trap, entry: str) -> tuple[Want, bool]:
    """What must come of the trap, and whether the tracer's own graph is unlike eager."""
    want = trap.others.get(entry, trap.want)
    if entry in ("export", "make_fx") and isinstance(want, type):
        want = Untraceable((want, ValueError))  # what eager raises, or what fake tensors raise in its place
    return (want.want, True) if isinstance(want, Unlike) else (want, False)


def outcome(run: Callable, args: list, around: Callable = nullcontext) -> Seen | type[Exception]:
    try:
        return seen(run, args, around)
    except Exception as error:
        return type(error)


def differ(one: Seen | type, other: Seen | type) -> bool:
    if isinstance(one, type) or isinstance(other, type):
        return one is not other
    try:
        assert_same(one, other, None)
    except AssertionError:
        return True
    return False


def pairs(traps: list[Trap]) -> list[tuple[Trap, str]]:
    return [(trap, entry) for trap in traps for entry in ENTRIES if entry != "inductor" or trap.number in INDUCTORS]


def rows(traps: list[Trap]) -> list:
    """One parameter per trap and entry point."""
    return [pytest.param(trap, entry, id=f"{trap.number}: {trap.name}-{entry}") for trap, entry in pairs(traps)]


@pytest.mark.parametrize(("trap", "entry"), rows(TRAPS))
def test_trap(trap, entry):
    check(trap, entry)


def check(trap: Trap, entry: str) -> None:
    program, args = built(trap.program), trap.inputs()
    want, unlike = wanted(trap, entry)
    eager = outcome(program, args, trap.around)
    if isinstance(want, Untraceable):
        with trap.around(), pytest.raises(want.error):
            traced(entry, program, copied(args))
        return
    if want is None:
        if OLD:
            with pytest.raises(AssertionError, match="Expected FakeTensor"):
                traced(entry, program, args)
            return
        assert any(isinstance(value, FakeTensor) for value in tensors(runnable(traced(entry, program, args))(*args)))
        return
    if isinstance(want, type):
        assert eager is want
        if entry == "symbolic_trace":
            with pytest.raises(ValueError, match="example_inputs do not fit the graph"):
                fusionpass.rewrite(traced(entry, program, args), copied(args))
            return
    if entry in COMPILERS:
        plain = torch.compile(program, backend=entry) if unlike else program
        after = fusionpass.fuse(lambda *inputs: program(*inputs), inner=entry)
    else:
        with trap.around():
            graph = traced(entry, program, copied(args))
            after, report = fusionpass.rewrite(graph, copied(args) if entry == "symbolic_trace" else None)
        plain, after = runnable(graph), runnable(after)
    if entry == "inductor" and trap.number == DRAWN_ANEW:
        check_draws(program, after, args)
        return
    before = outcome(plain, args, trap.around) if plain is not program else eager
    assert differ(before, eager) == unlike
    with fusionpass.collect() as collected, torch._inductor.config.patch(fallback_random=True):
        if isinstance(before, type):
            with pytest.raises(before):
                seen(after, args, trap.around)
        else:
            got = seen(after, args, trap.around)
    if isinstance(want, type):
        return
    report = collected if entry in COMPILERS else report
    sites, codes = (want, "") if isinstance(want, int) else (0, want)
    assert (len(report.rewrites), " ".join(miss.code for miss in report.misses)) == (sites, codes), report.misses
    assert all("{}" not in miss.reason for miss in report.misses)
    if not isinstance(before, type):
        exact = not sites and entry != "inductor"
        # A graph that export made of float32 holds it to that; where it is the program, the program tells the truth.
        truth = None if exact else seen(plain if unlike else program, in_double(args), trap.around)
        assert_same(got, before, truth, coarsest(trap, args))


def check_draws(program: Callable, after: Callable, args: list) -> None:
    """Inductor draws other numbers than eager from the same seed; they must be those of Inductor without the pass."""
    with torch._inductor.config.patch(fallback_random=True):
        want = seen(torch.compile(program, backend="inductor"), args)
        torch._dynamo.reset()
        got = seen(after, args)
    torch.testing.assert_close(got.values, want.values)
    assert got.shared == want.shared


def test_the_table_is_whole():
    assert {trap.number for trap in TRAPS} | ALONE == set(range(1, 62))
    counts = Counter((entry, kind(wanted(trap, entry)[0])) for trap, entry in pairs(TRAPS))
    kinds = ("rewritten", "refused", "no near miss", "raises", "untraceable")
    assert {entry: tuple(counts[entry, each] for each in kinds) for entry in ENTRIES} == {
        "eager": (79 - OLD, 67 + OLD, 8, 10, 0),
        "aot_eager": (80 - OLD, 68 + OLD, 8, 8, 0),
        "inductor": (8, 4, 0, 0, 0),
        "export": (82, 67 - OLD, 7, 0, 8 + OLD),
        "make_fx": (85 + NEW, 65 - NEW, 6, 0, 8),
        "symbolic_trace": (88, 60, 6, 4, 6),
    }
