"""CONTRIBUTING.md is true: its steps, followed in a copy of the package, give what they promise, and imports go one way."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
DIFFS = re.findall(r"^```diff\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
NEW = re.findall(r"^<!-- new file: (\S+) -->\n```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)

PROGRAM = """
import torch, fusionpass

def spelled(a, g, b):
    return a + torch.ops.prims.mul.default(torch.sigmoid(g), b)

def own(x):
    return 0.5 * torch.relu(x) ** 2

x = torch.randn(4, 8)
with torch.no_grad():
    for program, args in ((spelled, (x, x, x)), (own, (x,))):
        graph = torch.fx.symbolic_trace(program)
        new, report = fusionpass.rewrite(graph, args, verify=True)
        torch.testing.assert_close(new(*args), program(*args))
        print([(site.rule, site.stages, site.verified) for site in report.rewrites])
"""


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / "fusionpass", tmp_path / "fusionpass", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def run(folder, program=PROGRAM):
    """What the program prints with the package of this folder, a line each."""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.splitlines()


def test_the_steps_lead_to_sites(copy):
    assert len(DIFFS) == 3 and len(NEW) == 3
    for diff in DIFFS:
        subprocess.run(["git", "apply", "-"], cwd=copy, check=True, input=diff, text=True)
    for name, source in NEW:
        assert not (copy / name).exists()
        (copy / name).write_text(source, encoding="utf-8")
    expected = [("gated_add", ["gated_add"], True)], [("squared_relu", ["squared_relu", "scale"], True)]
    assert run(copy) == [repr(sites) for sites in expected]
    listed = "from fusionpass.cli.rules import rules_text; print(rules_text('table'))"
    assert any(line.startswith("squared_relu (rule)") for line in run(copy, listed))


def test_without_the_steps_there_is_no_site(copy):
    warm = "import warnings; warnings.simplefilter('ignore')\n"
    assert run(copy, warm + PROGRAM) == ["[]", "[]"]


def modules():
    found = {}
    for path in sorted((ROOT / "fusionpass").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(tree, known):
    """The package's modules that a module imports, on whatever occasion."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in known else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


def circle(edges):
    """Names that lead back to the first of them, [] when there is no such way."""
    done = set()

    def visit(name, way):
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(edges.get(name, ())):
            found = visit(other, [*way, name])
            if found:
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := visit(name, []))), [])


def test_circles_are_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_imports_go_one_way():
    """Between modules, and between folders."""
    trees = modules()
    edges = {name: set(imports(tree, trees)) - {name} for name, tree in trees.items()}
    assert sum(map(len, edges.values())) > 200
    assert circle(edges) == []

    def folder(name):
        return ".".join(name.split(".")[:2])

    between = {}
    for name, others in edges.items():
        between.setdefault(folder(name), set()).update(map(folder, others))
    assert circle({name: others - {name} for name, others in between.items()}) == []
