"""Layouts, operands and tolerances the op tests share."""

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from fusionpass import operators
from fusionpass.kernels.launching import Calls, Launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# The ops as plain functions, by the names that they have in torch.ops.fusionpass.
DIRECT = SimpleNamespace(**{op.name: op.direct for op in operators.OPS if op.direct is not None})

# How a tensor of a given shape is laid out: from a function that makes a dense one of any shape.
Make = Callable[..., Tensor]
LAYOUTS: dict[str, Callable[[Make, tuple[int, ...]], Tensor]] = {
    "contiguous": lambda make, shape: make(shape),
    "transposed": lambda make, shape: make(shape[::-1]).permute(*reversed(range(len(shape)))),
    "padded rows": lambda make, shape: make((*shape[:-1], shape[-1] + 5))[..., : shape[-1]],
    "every second column": lambda make, shape: make((*shape[:-1], 2 * shape[-1]))[..., ::2],
    "a half": lambda make, shape: make((*shape[:-1], 2 * shape[-1]))[..., shape[-1] :],
    "every second row": lambda make, shape: make((2 * shape[0], *shape[1:]))[::2],
    "one row, expanded": lambda make, shape: make((1, *shape[1:])).expand(shape),
    "one column, expanded": lambda make, shape: make((*shape[:-1], 1)).expand(shape),
    "one element, expanded": lambda make, shape: make((1,) * len(shape)).expand(shape),
}


def random_layout(rng: random.Random, make: Make, shape: tuple[int, ...], expand: bool = True) -> Tensor:
    """A tensor of `shape` whose dims are permuted, sliced, padded and (if `expand`) broadcast at random."""
    order = rng.sample(range(len(shape)), len(shape))
    base, index = [], []
    for dim in order:
        n = shape[dim]
        kind = rng.choice(["whole"] * 4 + ["step", "pad"] + ["expand"] * expand)
        base.append({"whole": n, "step": 2 * n, "pad": n + 1, "expand": 1}[kind])
        index.append({"step": slice(None, None, 2), "pad": slice(1, None)}.get(kind, slice(None)))
    inverse = [order.index(dim) for dim in range(len(shape))]
    return make(tuple(base))[tuple(index)].permute(inverse).expand(shape)


def random_gate_shape(rng: random.Random, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Any shape of one dim or more that broadcasts to `shape`."""
    kept = shape[rng.randrange(len(shape)) :]
    return tuple(rng.choice([n, n, 1]) for n in kept)


def significant(tensor: Tensor) -> list[int]:
    """Strides of the dims that have more than one element; none at all of an empty tensor."""
    return [s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1] if tensor.numel() else []


def gated_expression(a: Tensor, gate: Tensor, b: Tensor) -> Tensor:
    return a + torch.sigmoid(gate) * b


def projected_expression(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    logit = torch.nn.functional.linear(x, weight.reshape(1, -1), None if bias is None else bias.reshape(1))
    return a + torch.sigmoid(logit.reshape(*a.shape[:-1], 1)) * b


def doubled(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def assert_no_worse(y: Tensor, eager: Tensor, truth: Tensor, slack: float) -> None:
    """The largest error is no larger than that of the eager expression, but for `slack`, what fp32 itself may add."""
    if y.numel() == 0:
        return
    assert not y.isnan().any()
    worst, allowed = ((t.double() - truth).abs().max().item() for t in (y, eager))
    assert worst <= allowed + slack, f"error {worst:.3e}, eager's {allowed:.3e}, slack {slack:.1e}"


def sum_slack(a: Tensor, b: Tensor) -> float:
    """Two roundings of fp32 at the scale of the summands: how two correct fp32 sums may differ in their errors."""
    return 2 * 2.0**-24 * (a.abs().max() + b.abs().max()).item() if a.numel() else 0.0


def projected_slack(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> float:
    """The same, and the orders in which K products are summed: 16 roundings at most for K up to 6000 in blocks of 1024
    (6 in sequence, 10 in a tree) of at most |x|.|w|, through the sigmoid's largest slope, 1/4."""
    if not (a.numel() and x.numel()):
        return sum_slack(a, b)
    products = (x.abs().double() @ weight.abs().double().reshape(-1)).max().item()
    return sum_slack(a, b) + 16 * 2.0**-24 * products / 4 * b.abs().max().item()


ROUNDING = 2.0**-24  # of fp32, relative: half a unit in the last place


def largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def fill_fresh_memory_with_nan(monkeypatch) -> None:
    """What `torch.empty*` makes is all NaN from here on, so that an element nobody wrote cannot pass."""

    def filling(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, filling(getattr(torch, name)))


class Recorded(NamedTuple):
    """A launch that was prepared: the kernel's name, its programs, its arguments by name and Triton's options."""

    kernel: str
    blocks: int
    arguments: dict[str, int | bool]
    options: dict[str, int | bool]
    launch: Launch


def record_launches(monkeypatch, *modules) -> list[Recorded]:
    """Everything these kernel modules prepare from here on; they forget what they prepared before, and this after."""
    recorded = []

    class Recording(Launch):
        __slots__ = ()

        def __init__(self, kernel, device, blocks, arguments, compiled_for, **options):
            super().__init__(kernel, device, blocks, arguments, compiled_for, **options)
            names = kernel.arg_names[len(kernel.arg_names) - len(arguments) :]
            name = kernel.fn.__name__
            recorded.append(Recorded(name, blocks, dict(zip(names, arguments, strict=True)), options, self))

    for module in modules:
        monkeypatch.setattr(module, "Launch", Recording)
        forget_calls(monkeypatch, module)
    return recorded


def forget_calls(monkeypatch, *modules) -> None:
    """What the kernel modules prepared so far is out of sight for this test, and what it prepares is gone after it."""
    for module in modules:
        for name in ("_calls", "_into", "_fresh", "_with_logit"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, Calls())
