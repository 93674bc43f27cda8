"""What every measurement needs: a CUDA GPU, and kernels that run on it."""

from __future__ import annotations

import os


def ensure_gpu(what: str, instead: str = "") -> None:
    """Raise if there is no GPU. `what` needs it, such as "bench measures kernels". `instead` begins with a comma and
    says what can be done without a GPU.

    Raises:
        ValueError: torch finds no GPU, or Triton's interpreter is on. One sentence says what to do.
    """
    import torch

    if not torch.cuda.is_available():
        built = "" if torch.version.cuda or torch.version.hip else f" (torch {torch.__version__} is built without CUDA)"
        raise ValueError(f"no CUDA GPU here{built}; {what} on one: run it where there is one{instead}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1 is set, and interpreted kernels have no speed to measure: unset it")
