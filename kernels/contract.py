"""The parts of the ops' contracts: a `..._problem` returns a text that says why tensors do not fit the contract, or None.

Each op's own contract is beside its ATen form. An op raises RuntimeError with the text, as ATen's own ops do. Symbolic
sizes are refused only if they are known to differ: any other question about them would install guards.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

MOST_TOP_K = 32  # terms of a row's sum that one program adds up
MOST_COLUMNS = 16384  # of a row that one program holds
NUMERICS = ("fp32", "eager")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def known(holds: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds for certain. For symbolic sizes, no guard is installed."""
    if type(holds) is bool:
        return holds
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(holds)


def known_to_differ(m: int, n: int) -> bool:
    return known(m != n)


def known_outside(n: int, least: int, most: int) -> bool:
    return known(n < least) or known(n > most)


def shapes_differ(m: Sequence[int], n: Sequence[int]) -> bool:
    return len(m) != len(n) or any(map(known_to_differ, m, n))


def listed(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def promoted(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that eager's type promotion gives an expression of these tensors. Each has one dim or more."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    return dtypes.pop() if len(dtypes) == 1 else functools.reduce(torch.promote_types, dtypes)


def result_dtype(dtype: torch.dtype | None, *tensors: Tensor | None) -> torch.dtype:
    """The dtype of an op's result: the requested one, else the one that promotion gives."""
    return promoted(*tensors) if dtype is None else dtype


def kind_problem(named: dict[str, Tensor], dtype: torch.dtype | None = None) -> str | None:
    """Why the tensors are not all dense, of allowed dtypes and on one device, or why the requested dtype is not allowed."""
    first_name, first = next(iter(named.items()))
    for name, tensor in named.items():
        if tensor.layout != torch.strided:
            return f"{name} has layout {tensor.layout}, allowed: torch.strided"
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}, allowed: bfloat16, float16 or float32"
        if tensor.device != first.device:
            return f"{name} is on {tensor.device}, allowed: {first.device} as {first_name}"
    if dtype is not None and dtype not in DTYPES:
        return f"dtype is {dtype}, allowed: bfloat16, float16 or float32"
    return None


def one_dtype_problem(named: dict[str, Tensor]) -> str | None:
    """Why the tensors are not all of one dtype."""
    first_name, first = next(iter(named.items()))
    for name, tensor in named.items():
        if tensor.dtype != first.dtype:
            return f"{name} is {tensor.dtype}, allowed: {first.dtype} as {first_name}"
    return None
