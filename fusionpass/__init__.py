"""fusionpass: find a + sigmoid(g) * b in any torch.fx graph, swap in one kernel, say what was done and why."""

from fusionpass import _start

_start.leave_quietly_if_command()

from fusionpass import ops  # noqa: E402  whatever comes from here on imports torch
from fusionpass._version import __version__  # noqa: E402
from fusionpass.entry.collecting import collect  # noqa: E402
from fusionpass.entry.decorator import fuse  # noqa: E402
from fusionpass.entry.explain import explain  # noqa: E402
from fusionpass.entry.rewrite import Rewritten, rewrite  # noqa: E402
from fusionpass.errors import NothingRewritten, VerificationFailed  # noqa: E402
from fusionpass.report import Report  # noqa: E402

__all__ = [
    "NothingRewritten",
    "Report",
    "Rewritten",
    "VerificationFailed",
    "__version__",
    "collect",
    "explain",
    "fuse",
    "ops",
    "rewrite",
]


def __getattr__(name: str):
    """`fusionpass.passes` is imported on first use: it imports parts of torch that nothing else here needs."""
    if name == "passes":
        import importlib

        return importlib.import_module("fusionpass.passes")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
