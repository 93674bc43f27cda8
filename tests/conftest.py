"""No GPU: the real kernels run under Triton's interpreter, which must be chosen before triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest

PROGRAMS = 80


def pytest_addoption(parser):
    parser.addoption(
        "--fuzz", type=int, default=PROGRAMS, metavar="N", help=f"random programs per test; default {PROGRAMS}"
    )


def pytest_configure(config):
    """As many random programs as asked for: the same ones each time by default, others when more are wanted."""
    count = config.getoption("--fuzz")
    hypothesis.settings.register_profile(
        "fuzz",
        max_examples=count,
        derandomize=count == PROGRAMS,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.settings.load_profile("fuzz")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Each test compiles for itself: a graph cached by an earlier one would not reach the pass again."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def verified(monkeypatch):
    """Every site that a test rewrites is run against the nodes it replaces, unless the test says otherwise."""
    from fusionpass.options import Options

    from_user = Options.from_user.__func__

    def verifying(cls, given, **defaults):
        return from_user(cls, {"verify": True, **given}, **defaults)

    monkeypatch.setattr(Options, "from_user", classmethod(verifying))
