"""Random programs around the formula behave as without the pass: values, dtypes, shapes, strides, aliasing, mutated inputs,
random numbers, gradients. Each program is source text, so that a failing one prints as something to run.

More than the default number: `pytest tests/test_fuzz.py --fuzz 2000`, other ones with `--hypothesis-seed 1`; thousands, with
all differences of a run and not the first alone: `tests/fuzz.py`.
"""

import fuzz_programs
import torch
from fuzz_checks import CHECKS, Skipped
from hypothesis import event, given, note, settings
from hypothesis import strategies as st


def part(share: float) -> settings:
    """Of the programs asked for, so that no check takes much longer than the others."""
    return settings(max_examples=max(1, int(settings().max_examples * share)))


@st.composite
def programs(draw, kind: str) -> str:
    return getattr(fuzz_programs, kind)(lambda options: draw(st.sampled_from(options)))


def checked(kind: str, source: str) -> None:
    note(source)
    try:
        event("rewritten" if CHECKS[kind](source) else "without a site")
    except Skipped:
        event("cannot run without the pass")


@part(0.75)
@given(programs("compiled"))
def test_compiled(source):
    checked("compiled", source)


@part(0.15)  # each by two captures; `compiled` draws the same ones
@given(programs("fused"))
def test_fused(source):
    torch._dynamo.reset()
    checked("fused", source)


@given(programs("recorded"))
def test_recorded(source):
    checked("recorded", source)


@part(0.75)
@given(programs("trained"))
def test_trained(source):
    checked("trained", source)


@given(programs("of_modules"))
def test_modules(source):
    checked("of_modules", source)
