"""Which implementation computes an op: our Triton kernels or ATen, by device and dtype.

Triton is imported only when a tensor arrives that the kernels take. The ATen form runs on any kind of device.
"""

from __future__ import annotations

import functools
import importlib
import os

import torch
from torch import Tensor

from fusionpass.kernels.contract import DTYPES

Dtype = torch.dtype | None

ALL = frozenset(DTYPES)
NO_BFLOAT16 = ALL - {torch.bfloat16}
NONE: frozenset[torch.dtype] = frozenset()


@functools.cache
def interpreted() -> bool:
    """Whether the Triton kernels compute on CPU tensors. Decided once, as in Triton itself."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported: a torch with CUDA may come without it, as on Windows."""
    try:
        importlib.import_module("triton")
    except ImportError:
        return False
    return True


@functools.cache
def dtypes_of_gpu(device: torch.device) -> frozenset[torch.dtype]:
    """The dtypes that the kernels take on a CUDA device. Triton compiles bf16 from compute capability 8.0 on."""
    if not has_triton():
        return NONE
    old = torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)
    return NO_BFLOAT16 if old else ALL


def kernel_dtypes(a: Tensor) -> frozenset[torch.dtype]:
    """The dtypes that the kernels take on the tensor's device."""
    if a.is_cuda:
        return dtypes_of_gpu(a.device)
    return ALL if a.is_cpu and interpreted() else NONE


def kernels_take(*tensors: Tensor | None, dtype: Dtype = None) -> bool:
    """Whether the kernels compute an op on these tensors of one device, with results in `dtype`. Otherwise ATen does."""
    taken = kernel_dtypes(tensors[0])
    if taken is ALL or not taken:
        return taken is ALL
    floating = [t.dtype for t in tensors if t is not None and t.is_floating_point()]
    return taken.issuperset(floating if dtype is None else [*floating, dtype])
