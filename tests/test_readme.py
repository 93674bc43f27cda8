"""Every fenced block of README.md runs as it stands: Python in a prelude of names, console lines by the command."""

import copy
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch

import fusionpass
from fusionpass.cli import main

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
LINES = [line[2:] for kind, text in BLOCKS if kind == "console" for line in text.splitlines()]
H = 16
MINE = torch.library.Library("mine", "DEF")  # the op of a rule in README
MINE.define("squared_relu(Tensor x) -> Tensor")
MINE.impl("squared_relu", lambda x: torch.relu(x) ** 2, "CompositeExplicitAutograd")

MY_MODEL = """
import torch

class Block(torch.nn.Module):
    def __init__(self, hidden=2048):
        super().__init__()
        self.gate, self.up = torch.nn.Linear(hidden, 1), torch.nn.Linear(hidden, hidden)

    def forward(self, x):
        return x + torch.sigmoid(self.gate(x)) * self.up(x)
"""


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = torch.nn.Linear(H, 1), torch.nn.Linear(H, H)

    def forward(self, x):
        return x + torch.sigmoid(self.gate(x)) * self.up(x)


class Model(torch.nn.Module):
    """Takes ids, as a language model does."""

    def __init__(self):
        super().__init__()
        self.embedding, self.block = torch.nn.Embedding(32, H), Block()

    def forward(self, input_ids):
        return self.block(self.embedding(input_ids))


def prelude():
    """The names that the snippets take for granted: what a reader has, a model and one call's input."""
    torch.manual_seed(0)
    block, example_input = Block(), torch.randn(4, H)
    return {
        "torch": torch,
        "fusionpass": fusionpass,
        "model": Model(),
        "ids": torch.arange(6).reshape(2, 3),
        "block": block,
        "example_input": example_input,
        "exported_program": torch.export.export(copy.deepcopy(block), (example_input,)),
    }


def decorates(names):
    fused = names["SparseBlock"]
    assert issubclass(fused, torch.nn.Module)


def compiles(names):
    """Each line by itself: a reader picks one."""
    text = next(text for text in PYTHON if 'mode="reduce-overhead"' in text)
    for line in text.splitlines():
        torch._dynamo.reset()
        own = prelude()
        expected = own["model"](own["ids"])
        with torch.no_grad(), fusionpass.collect() as report:
            exec(line, own)
            torch.testing.assert_close(own["model"](own["ids"]), expected)
        assert len(report.rewrites) == 1, line


def rewrites(names):
    assert len(names["report"].rewrites) == 1
    assert "gate_projected_add" in names["graph_module"].code
    assert "gate_projected_add" in names["new_program"].graph_module.code


def reports(names):
    assert len(names["report"].rewrites) == 1 and "needs-grad" not in str(names["report"])


def brings_a_rule(names):
    report = fusionpass.explain(lambda x: torch.relu(x) ** 2, rules=[names["squared_relu"]])(torch.randn(4, 8))
    assert [site.rule for site in report.rewrites] == ["squared_relu"]


# What tells a Python block -> what must hold after it has run.
CHECKS = {
    "class SparseBlock": decorates,
    'mode="reduce-overhead"': compiles,
    "fusionpass.rewrite(exported_program)": rewrites,
    "fusionpass.explain(model)": reports,
    "from fusionpass.rules import": brings_a_rule,
}


def test_every_block_is_of_a_kind_that_is_run():
    kinds = {kind for kind, _ in BLOCKS}
    assert kinds == {"python", "console", "bash"}  # bash: the two that install, which CI runs
    assert all(text.startswith("python3 -m venv .venv && ") for kind, text in BLOCKS if kind == "bash")
    assert all(line.startswith("$ ") for kind, text in BLOCKS if kind == "console" for line in text.splitlines())
    for text in PYTHON:
        assert sum(words in text for words in CHECKS) == 1, text
    assert len(PYTHON) == len(CHECKS)


@pytest.mark.parametrize("words", CHECKS)
def test_python(words):
    (text,) = [text for text in PYTHON if words in text]
    names = prelude()
    if "..." in text and "class SparseBlock" not in text:
        pytest.fail("a block with an ellipsis is no program")
    exec(text, names)
    CHECKS[words](names)


REPORTS = [line for line in LINES if line.startswith(("fusionpass report", "fusionpass rules"))]
SAVED = [line for line in LINES if "--from" in line]
MEASURED = [line for line in LINES if line.startswith("fusionpass bench") and line not in SAVED]


def words_of(line):
    command, *words = shlex.split(line, comments=True)
    assert command == "fusionpass"
    return words


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_model.py").write_text(MY_MODEL)
    shutil.copy(ROOT / "tests" / "baselines" / "h200.json", tmp_path / "run.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("my_model", None)


def test_every_line_is_of_a_kind_that_is_run():
    assert sorted(REPORTS + SAVED + MEASURED) == sorted(LINES)
    assert REPORTS and SAVED and MEASURED


@pytest.mark.parametrize("line", REPORTS)
def test_reports(folder, capsys, line):
    if "qwen" in line:
        pytest.importorskip("transformers")
    status = main(words_of(line))
    out, err = capsys.readouterr()
    assert (status, [text for text in err.splitlines() if not text.startswith("note: ")]) == (0, [])
    if "report" in words_of(line):
        assert " rewritten (" in out and " against eager, " in out
    if "--diff" in line:
        assert "\n--- graph 0 before" in out


@pytest.mark.parametrize("line", SAVED)
def test_a_saved_run(folder, capsys, line):
    assert main(words_of(line)) == 0
    assert "H200" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes to hours where there is a GPU")
@pytest.mark.parametrize("line", MEASURED)
def test_measurements_need_a_gpu_and_nothing_else(folder, capsys, line):
    if "--plot" in line:
        pytest.importorskip("matplotlib")
    assert main(words_of(line)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("fusionpass bench: no CUDA GPU here") and err.count("\n") == 1


# What README says in passing.


@pytest.mark.parametrize("name", ["Pass", "InductorPass"])
def test_the_passes_are_there_without_an_import_of_their_own(name):
    assert callable(getattr(fusionpass.passes, name))


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="has no attribute 'pases'"):
        fusionpass.pases  # noqa: B018


@pytest.mark.parametrize("options", [{"mode": "reduce-overhead"}, {"inductor": {"epilogue_fusion": True}}])
@pytest.mark.parametrize("inner", [{}, {"inner": "eager"}, {"inner": "aot_eager"}])
def test_options_of_inductor_say_what_to_add(options, inner):
    (name,) = options
    with pytest.raises(ValueError, match=f"option '{name}' is .* add inner='inductor', or leave '{name}' out"):
        fusionpass.fuse(Block(), **options, **inner)
