"""A file of the user's, and the command as a function."""

import sys

import pytest

from fusionpass.cli import main

CODE = """
import sys, torch
print("a print of the user's file")

class Combine(torch.nn.Module):
    def forward(self, a, g, b):
        return a + torch.sigmoid(g) * b

class Kept(torch.nn.Module):
    def forward(self, a, g, b):
        product = torch.sigmoid(g) * b
        return a + product, product

class Plain(torch.nn.Module):
    def forward(self, a, g, b):
        return a * b

class Fails(torch.nn.Module):
    def forward(self, a, g, b):
        return a.view(7, 7, 7)

class Raises(torch.nn.Module):
    def forward(self, a, g, b):
        raise OSError("first line\\nsecond line")

class Interrupted(torch.nn.Module):
    def __init__(self):
        raise KeyboardInterrupt

class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Broken() for _ in range(5))

    def forward(self, a, g, b):
        for layer in self.layers:
            a = layer(a, g, b)
        return a

class Broken(torch.nn.Module):
    def forward(self, a, g, b):
        torch._dynamo.graph_break()
        return a + torch.sigmoid(g) * b

example_inputs = (torch.ones(4, 8), torch.ones(4, 1), torch.ones(4, 8))
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    path = tmp_path / "sample.py"
    path.write_text(CODE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield str(path)
    sys.modules.pop("sample", None)


@pytest.fixture
def run(capsys):
    """`run(*words)` gives exit code, standard output and standard error of the command."""

    def call(*words):
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def refused(run):
    """`refused(*words)` gives the one line of standard error that goes with exit code 2."""

    def call(*words):
        status, out, err = run(*words)
        assert (status, out) == (2, "")
        assert err.count("\n") == 1 and err.endswith("\n")
        assert "Traceback" not in err
        return err

    return call
