"""What PyTorch's caches know this package by: what is compiled depends on its sources, and no graph shows them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch.compiler.config

from fusionpass._version import __version__


@cache
def digest() -> str:
    """A hash of the version and of every source file, the kernels' included."""
    found = hashlib.sha256(__version__.encode())
    package = Path(__file__).parent
    folders = os.walk(package, followlinks=True)  # in a checkout the kernels are behind a link
    for path in sorted(Path(folder, name) for folder, _, names in folders for name in names if name.endswith(".py")):
        found.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


@contextmanager
def in_cache_keys() -> Iterator[None]:
    """Inside the block, Inductor's and AOTAutograd's caches take an entry of other sources for a miss.

    A graph with our ops in it is the same whatever these are made of; an entry of an older release would run its code.
    """
    before = torch.compiler.config.cache_key_tag
    with torch.compiler.config.patch(cache_key_tag=f"{before} fusionpass {digest()}"):
        yield
