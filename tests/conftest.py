"""No GPU: the real kernels run under Triton's interpreter, which must be chosen before triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Each test compiles for itself: a graph cached by an earlier one would not reach the pass again."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
