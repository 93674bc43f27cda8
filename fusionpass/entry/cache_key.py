"""The package's part in the keys of PyTorch's caches. Compiled code depends on the package's sources, and no graph
shows them."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch.compiler.config

from fusionpass._version import __version__
from fusionpass.rules.rule import Rule, Stage


@cache
def digest(own: tuple[Rule | Stage, ...] = ()) -> str:
    """A hash of the version, of every source file (also the kernels'), and of the user's own rules."""
    found = hashlib.sha256(__version__.encode())
    package = Path(__file__).parents[1]
    folders = os.walk(package, followlinks=True)  # in a checkout the kernels are behind a link
    for path in sorted(Path(folder, name) for folder, _, names in folders for name in names if name.endswith(".py")):
        found.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    for each in own:
        found.update(f"{each!r} {each.version}".encode())
        for source in sorted(set(map(_source, _functions(each)))):
            found.update(source)
    return found.hexdigest()


def _functions(own: Rule | Stage) -> Iterable[Callable]:
    return (own.grow, own.saves) if isinstance(own, Stage) else (own.find, own.bits, own.saves, *own.guards)


def _source(function: Callable) -> bytes:
    """The whole source of the module in which the function is written, since what it calls counts too."""
    try:
        return Path(inspect.getsourcefile(inspect.unwrap(function))).read_bytes()
    except (TypeError, OSError):  # written at a prompt: no other process has it
        return repr(function).encode()


@contextmanager
def in_cache_keys(own: Iterable[Rule | Stage] = ()) -> Iterator[None]:
    """Inside the block, a cache entry of Inductor or AOTAutograd that comes from other sources is a miss.

    A graph with our ops stays the same when the code of the ops changes, so an entry of an older release would run old code.
    The same holds for the ops of a user's rule.
    """
    before = torch.compiler.config.cache_key_tag
    with torch.compiler.config.patch(cache_key_tag=f"{before} fusionpass {digest(tuple(own))}"):
        yield
