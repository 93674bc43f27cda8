"""No GPU: the real kernels run under Triton's interpreter, which must be chosen before triton is imported."""

import dataclasses
import os
import types
import zlib
from pathlib import Path

import torch

# Inductor tries a compiler on each vector instruction set, once per cache folder and process: 7 s.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest

PROGRAMS = 80
# A failed assert in a helper shows its values, as in a test.
pytest.register_assert_rewrite("trap_checks", *(path.stem for path in Path(__file__).parent.glob("*_helpers.py")))


def pytest_addoption(parser):
    parser.addoption(
        "--fuzz", type=int, default=PROGRAMS, metavar="N", help=f"random programs per test; default {PROGRAMS}"
    )
    parser.addoption(
        "--verify",
        choices=("half", "on", "off"),
        default="half",
        help="whether tests that do not say run with the option 'verify'; half: every other one, by its name",
    )


def pytest_configure(config):
    """As many random programs as asked for: the same ones each time by default, others when more are wanted."""
    config.addinivalue_line("markers", "of_verify: the option `verify` itself is tested, so it is always on")
    count = config.getoption("--fuzz")
    hypothesis.settings.register_profile(
        "fuzz",
        max_examples=count,
        derandomize=count == PROGRAMS,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.settings.load_profile("fuzz")


@pytest.fixture(autouse=True, scope="session")
def guards_not_timed():
    """Dynamo times each new guard once, with the CPU's caches flushed: 25 ms of the 60 that a small function compiles in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._dynamo.guards, "profile_guard_manager", lambda *args: 0.0)
        yield


@pytest.fixture(autouse=True, scope="session")
def interpreter_in_a_hurry():
    """Triton's interpreter without what costs most and finds nothing here: half of the time of an op that calls helpers.

    It patches triton.language anew for each call of a helper inside a kernel, and triton.language.core for those of Triton's
    own, which once is enough for; and it asserts of each sum and product of indices that they do not overflow, which those
    of tensors of these sizes cannot.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.language import core
    from triton.runtime import interpreter

    def call(self, *args, **kwargs):
        function = self.rewrite()
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    patched = interpreter._patch_lang(types.SimpleNamespace(__globals__={"core": core}))
    options = interpreter.interpreter_builder.options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        patch.setattr(interpreter.interpreter_builder, "options", dataclasses.replace(options, sanitize_overflow=False))
        yield
    patched.restore()


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Each test compiles for itself: a graph cached by an earlier one would not reach the pass again."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def verified(request, monkeypatch):
    """In half of the tests every site rewritten is run against the nodes it replaces, unless the test says otherwise.

    In the others it is not, as it is for users: what goes right only while `verify` runs is seen there. Which half a test
    is in depends on its name alone, so that a failure can be repeated; the rows of a table fall into both.
    """
    chosen = request.config.getoption("--verify")
    verify = zlib.crc32(request.node.nodeid.encode()) % 2 == 0 if chosen == "half" else chosen == "on"
    verify = verify or request.node.get_closest_marker("of_verify") is not None
    from fusionpass.options import Options

    from_user = Options.from_user.__func__

    def verifying(cls, given, **defaults):
        return from_user(cls, {"verify": verify, **given}, **defaults)

    monkeypatch.setattr(Options, "from_user", classmethod(verifying))
