"""fusionpass: find a + sigmoid(g) * b in any torch.fx graph, swap in one kernel, say what was done and why."""

from fusionpass import ops
from fusionpass._version import __version__
from fusionpass.collecting import collect
from fusionpass.decorator import fuse
from fusionpass.errors import NothingRewritten, VerificationFailed
from fusionpass.explain import explain
from fusionpass.report import Report
from fusionpass.rewrite import Rewritten, rewrite

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
