"""The line of progress on a terminal, and none elsewhere."""

import io
import time

import pytest

from fusionpass.cli import progress as cli_progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(cli_progress, "PERIOD_S", 0.01)
    monkeypatch.setattr(cli_progress, "PATIENCE_S", 0.0)


def test_progress_on_a_terminal_is_erased_at_the_end(hasty):
    stream = Terminal()
    with cli_progress.Progress(stream) as progress:
        progress.stage("building qwen3_next")
        time.sleep(0.1)
        progress.stage("capturing")
        time.sleep(0.1)
    text = stream.getvalue()
    assert "building qwen3_next ... 0 s" in text and "capturing" in text
    assert "\n" not in text
    longest = max(map(len, text.split("\r")))
    assert text.split("\r")[-2].isspace() and text.endswith("\r")
    assert len(text.split("\r")[-2]) <= longest


def test_no_progress_without_a_terminal(hasty):
    stream = io.StringIO()
    with cli_progress.Progress(stream) as progress:
        progress.stage("building")
        time.sleep(0.05)
    assert stream.getvalue() == ""


def test_progress_has_a_bar(monkeypatch):
    monkeypatch.setattr(cli_progress, "PERIOD_S", 0.01)
    monkeypatch.setattr(cli_progress, "PATIENCE_S", 0.0)
    stream = Terminal()
    with cli_progress.Progress(stream) as progress:
        progress.stage("gate_projected_add 32 x 4096: compiling")
        progress.fraction(21, 42)
        time.sleep(0.1)
    assert "gate_projected_add 32 x 4096: compiling ... [##########..........] 21/42 0 s" in stream.getvalue()
