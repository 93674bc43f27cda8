"""`v += ...` where v is part of a larger buffer: a fresh sum would not have around it what the buffer has."""

import pytest
import torch
from programs import captured, operands, through_make_fx

S = torch.sigmoid


def rows(x, g, b):
    v = (x * 2)[:2]
    v += S(g) * b
    return v.as_strided((4, 8), (8, 1))


def rows_from_below(x, g, b):
    v = (x * 2)[2:]
    v += S(g) * b
    return v.as_strided((4, 8), (8, 1), 0)


def chunk(x, g, b):
    v, _ = (x * 2).chunk(2)
    v += S(g) * b
    return v.view(-1).as_strided((32,), (1,))


def handed_out(x, g, b):
    """What lies around it is the caller's to read."""
    v = (x * 2)[:2]
    v += S(g) * b
    return v


PARTS = {"rows": rows, "rows from below": rows_from_below, "a chunk": chunk, "handed out": handed_out}


@pytest.mark.parametrize("function", PARTS.values(), ids=PARTS)
def test_part_of_a_buffer_stays_in_place(function):
    x, g, b = operands((4, 8), (2, 1), (2, 8))
    with torch.no_grad():
        report = captured(function, x, g, b)
    assert [miss.code for miss in report.misses] == ["in-place-visible"] and not report.rewrites
    assert "part of a larger buffer" in report.misses[0].reason


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_part_of_a_buffer_stays_in_place_in_make_fx(mode):
    x, g, b = operands((4, 8), (2, 1), (2, 8))
    after, report = through_make_fx(rows, x, g, b, mode=mode)
    assert [miss.code for miss in report.misses] == ["in-place-visible"] and not report.rewrites
    torch.testing.assert_close(after(x, g, b), rows(x, g, b))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_buffer_of_its_own_is_rewritten(mode):
    def function(x, g, b):
        v = x * 2
        v += S(g) * b
        return v.as_strided((2, 8), (8, 1))

    x, g, b = operands((4, 8), (4, 1), (4, 8))
    after, report = through_make_fx(function, x, g, b, mode=mode)
    assert len(report.rewrites) == 1
    torch.testing.assert_close(after(x, g, b), function(x, g, b))
