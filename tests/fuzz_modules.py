"""Leaf modules for random programs under symbolic_trace: torch's own, subclasses of them, and some with a state."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class OwnSigmoid(nn.Sigmoid):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return input.tanh()


class OwnLinear(nn.Linear):
    """As adapters do: the base's result and something more."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2 + 1


class OwnNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(0))


class Counter(nn.Module):
    """Writes a buffer that it is not given."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.full((4, 6), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(x.detach())
        return x * 1


class Silent(Counter):
    """The same, with a result that has nothing to do with it."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen.mul_(0.5)
        return torch.ones_like(x)


class InPlace(nn.Module):
    """Writes its argument."""

    def forward(self, x: Tensor) -> Tensor:
        x.detach().mul_(0.5)
        return x * 1


class Same(nn.Identity):
    """An identity that is none."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Program(nn.Module):
    """The leaf modules under the names that programs know."""

    def __init__(self, prepare: Callable[[nn.Module], object]):
        super().__init__()
        torch.manual_seed(1)
        self.gate, self.own_gate = nn.Linear(6, 1), OwnLinear(6, 1, bias=False)
        self.act, self.own_sigmoid = nn.Sigmoid(), OwnSigmoid()
        self.norm, self.own_norm = nn.RMSNorm(6, eps=1e-5), OwnNorm(6, eps=1e-5)
        self.batch_norm = nn.BatchNorm1d(6)
        self.counter, self.silent, self.in_place, self.same = Counter(), Silent(), InPlace(), Same()
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.table = nn.Embedding(8, 6, max_norm=0.5)
        self.table_of_rows = Rows(self.table)
        self.drop.eval()
        prepare(self)


def of_program(program: Callable, prepare: Callable[[nn.Module], object]) -> Program:
    """A module whose forward is the program, of a class of its own, since tracers ask the class."""
    return type("Fuzzed", (Program,), {"forward": program})(prepare)


class Rows(nn.Module):
    """Renormalises a weight that belongs to another module."""

    def __init__(self, table: nn.Embedding):
        super().__init__()
        self.of = [table]  # a list, so that it is no child

    def forward(self, x: Tensor) -> Tensor:
        return self.of[0](torch.arange(4, device=x.device)) + x


class Tracer(torch.fx.Tracer):
    """Keeps every module of this file as a leaf, besides torch.nn's."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return type(module).__module__ == __name__ or super().is_leaf_module(module, name)


def patch(module: nn.Module, forward: Callable) -> None:
    """Replace the forward on the instance, as accelerate, liger and adapters do; `forward` is given the old one."""
    old = module.forward
    module.forward = lambda input=None, x=None: forward(old, input if x is None else x)
