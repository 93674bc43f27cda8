"""The command: reports on standard output, one line and exit code 2 for bad input, expectations as exit codes."""

import io
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from fusionpass.cli import main
from fusionpass.cli import progress as cli_progress
from fusionpass.rules import catalog

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


# Reports


def test_report_on_a_model_type(run):
    pytest.importorskip("transformers")
    status, out, err = run("report", "qwen3_next", "--layers", 2, "--expect", 2)
    assert (status, err) == (0, "")
    assert "modeling_qwen3_next.py:" in out and "model.layers.1.mlp" in out
    stages = "2 with finalize, 2 with gate_projection, 2 with residual, 2 with rms_norm"
    assert f"2 rewritten ({stages}), 0 near misses" in out.splitlines()[-1]


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_5_moe", "qwen3_omni_moe_talker_text"])
def test_every_family_has_one_site_per_layer(run, model_type):
    pytest.importorskip("transformers")
    assert run("report", model_type, "--layers", 2, "--expect", 2)[0] == 0


def test_sites_that_layers_share_are_expected_once_per_layer(run):
    pytest.importorskip("transformers")
    status, out, err = run("report", "qwen4_exp", "--layers", 4, "--tokens", 3, "--expect", 4)
    assert status == 0
    assert "captured, run 4 times" in out
    assert err.startswith("note: the config of qwen4_exp_text leaves sizes open")


def test_expect_counts_runs_of_a_shared_graph(run, code):
    status, out, _ = run("report", f"{code}:Layers", "--expect", 5)
    assert status == 0, out
    assert "1 site captured, runs 5 times" in out
    status, _, err = run("report", f"{code}:Layers", "--expect", 1)
    assert status == 1
    assert "expected 1 rewritten sites, found 5 (1 captured, shared by layers)" in err


def test_json_has_every_field(run, code):
    status, out, _ = run("report", f"{code}:Combine", "--format", "json")
    found = json.loads(out)
    assert status == 0
    assert list(found) == ["fusionpass", "torch", "target", "graphs", "graph_breaks", "rewrites", "misses"]
    assert found["target"] == f"{code}:Combine"
    assert found["rewrites"][0]["rule"] == "gated_add"


@pytest.mark.parametrize(
    "style, start, diff",
    [
        ("table", "", "--- graph 0 before"),
        ("markdown", "## ", "```diff\n--- graph 0 before"),
        ("html", "<section", "<pre>--- graph 0 before"),
    ],
)
def test_formats_and_diff(run, code, style, start, diff):
    status, out, _ = run("report", f"{code}:Combine", "--format", style, "--diff")
    assert status == 0
    assert out.startswith(start) and diff in out
    removed = [line for line in out.splitlines() if line.startswith("-") and "sigmoid" in line]
    assert removed, out


def test_diff_in_json_is_the_code_of_its_graphs(run, code):
    graph = json.loads(run("report", f"{code}:Combine", "--format", "json", "--diff")[1])["graphs"][0]
    assert "sigmoid" in graph["code_before"] and "fusionpass.gated_add" in graph["code_after"]


def test_diff_without_a_rewrite(run, code):
    assert run("report", f"{code}:Plain", "--diff")[1].endswith("\nno graph changed\n")


def test_an_archive(run, tmp_path):
    class Combine(torch.nn.Module):
        def forward(self, a, g, b):
            return a + torch.sigmoid(g) * b

    path = tmp_path / "combine.pt2"
    torch.export.save(torch.export.export(Combine(), (torch.ones(4, 8), torch.ones(4, 1), torch.ones(4, 8))), path)
    status, out, err = run("report", path, "--expect", 1, "--diff")
    assert (status, err) == (0, "")
    assert out.startswith(str(path)) and "--- graph 0 before" in out


@pytest.mark.parametrize("name, first", [("r.json", "{"), ("r.md", "## "), ("r.html", "<section"), ("r.txt", "")])
def test_output_file(run, code, tmp_path, name, first):
    path = tmp_path / name
    status, out, err = run("report", f"{code}:Combine", "-o", path)
    assert (status, out) == (0, "")
    assert err.splitlines()[-1].startswith(f"{path}: 1 rewritten")
    assert path.read_text().startswith(first)


def test_dash_is_standard_output(run, code):
    assert "1 rewritten" in run("report", f"{code}:Combine", "-o", "-")[1]


def test_prints_of_the_target_go_to_standard_error(run, code):
    _, out, err = run("report", f"{code}:Combine", "--format", "json")
    assert json.loads(out)
    assert err == "a print of the user's file\n"


def test_options_reach_the_pass(run, code):
    pytest.importorskip("transformers")
    words = ("report", "qwen2_moe", "--layers", 1, "--rules", "gated_add", "--inner", "aot_eager", "--format", "json")
    site = json.loads(run(*words)[1])["rewrites"][0]
    assert site["stages"] == ["gated_add"]
    assert site["dtype"] == "bfloat16"


# Expectations

EXPECTATIONS = {
    "met": ("Combine", ["--expect", "1"], 0, ""),
    "zero met": ("Plain", ["--expect", "0"], 0, ""),
    "too few": (
        "Kept",
        ["--expect", "1"],
        1,
        "expected 1 rewritten sites, found 0; 0 rewritten in 1 graph, 1 near miss: 1 x multi",
    ),
    "too many": ("Combine", ["--expect", "0"], 1, "expected 0 rewritten sites, found 1; no near misses"),
    "none at all": ("Plain", ["--expect", "1"], 1, "no sigmoid feeds a product that feeds an add"),
    "strict met": ("Combine", ["--strict"], 0, ""),
    "strict": ("Plain", ["--strict"], 1, "--strict: 0 rewritten"),
    "neither": ("Plain", [], 0, ""),
}


@pytest.mark.parametrize("name, words, expected, line", EXPECTATIONS.values(), ids=EXPECTATIONS)
def test_expectations(run, code, name, words, expected, line):
    status, out, err = run("report", f"{code}:{name}", *words)
    lines = err.splitlines()[1:]  # the first is the file's own print
    assert status == expected
    assert "rewritten" in out  # the report comes first, met or not
    assert len(lines) == (1 if expected else 0)
    assert line in err


# Bad input: exit code 2 and one line

BAD = {
    "nothing": ([], "see fusionpass --help"),
    "unknown command": (["repport"], "'repport'"),
    "no target": (["report"], "TARGET"),
    "unknown option": (["report", "x", "--layer", "2"], "--layer"),
    "layers": (["report", "x", "--layers", "two"], "'two' is not a whole number from 1 up"),
    "expect": (["report", "x", "--expect", "-1"], "--expect"),
    "format": (["report", "x", "--format", "yaml"], "'yaml'"),
    "dtype": (["report", "x", "--dtype", "int8"], "'int8'"),
    "numerics": (["report", "x", "--numerics", "exact"], "'exact'"),
    "inner": (["report", "x", "--inner", "nope"], "option 'inner' is 'nope'"),
    "rules": (["report", "x", "--rules", "gated_ad"], "option 'rules' names 'gated_ad'"),
    "core left out": (["report", "x", "--rules", "gate_projection"], "without 'gated_add'"),
    "no folder for -o": (["report", "x", "-o", "no/such/folder/r.md"], "there is no folder 'no/such/folder'"),
    "-o is a folder": (["report", "x", "-o", "."], "it is a folder"),
    "missing file": (["report", "no_such.py:Block"], "no file 'no_such.py'"),
    "missing module": (["report", "no_such_module:Block"], "no module 'no_such_module'"),
    "missing archive": (["report", "no_such.pt2"], "no archive 'no_such.pt2'"),
    "no module": (["report", "math:pi"], "'math:pi' is of type float"),
    "no folder": (["report", "./no/such"], "'./no/such'"),
    "bad input": (["report", "math:sqrt", "--input", "bf16"], "'bf16'"),
}


@pytest.mark.parametrize("words, expected", BAD.values(), ids=BAD)
def test_bad_input(refused, words, expected):
    assert expected in refused(*words)


HUGGING_FACE_BAD = {
    "unknown type": (["report", "qwen3_nxt"], "qwen3_next"),
    "incomplete default": (["report", "dots1"], "could not be built"),
    "meta has no values": (["report", "longcat_flash", "--layers", "2"], "try --device cpu --layers 2"),
    "too many layers": (["report", "qwen2_moe", "--layers", "99"], "--layers 99"),
    "input": (["report", "qwen2_moe", "--input", "i64[1,4]"], "--input has no effect"),
}


@pytest.mark.parametrize("words, expected", HUGGING_FACE_BAD.values(), ids=HUGGING_FACE_BAD)
def test_bad_hugging_face_input(refused, words, expected):
    pytest.importorskip("transformers")
    assert expected in refused(*words)


def test_broken_config(refused, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": ')
    assert "could not be read as JSON" in refused("report", tmp_path)


def test_broken_archive(refused, tmp_path):
    path = tmp_path / "broken.pt2"
    path.write_bytes(b"no archive")
    assert "torch.export.save" in refused("report", path)


def test_transformers_missing(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert 'pip install "fusionpass[hf]"' in refused("report", "qwen3_next")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_gpu(refused):
    assert "no CUDA GPU" in refused("report", "math:sqrt", "--device", "cuda", "--input", "fp32[2]")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(refused, tmp_path):
    tmp_path.chmod(0o500)
    assert "permission denied" in refused("report", "x", "-o", tmp_path / "r.md")


CANNOT_BE_CAPTURED = {"Fails": "sample.py:", "Raises": "OSError: first line"}


@pytest.mark.parametrize("name, words", CANNOT_BE_CAPTURED.items(), ids=CANNOT_BE_CAPTURED)
def test_a_model_that_cannot_be_captured(run, code, monkeypatch, name, words):
    status, out, err = run("report", f"{code}:{name}")
    line = err.splitlines()[-1]
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 2 and "Traceback" not in err  # the file's print, then the line
    assert f":{name}' cannot be captured: " in line and words in line and "FUSIONPASS_TRACEBACK=1" in line
    monkeypatch.setenv("FUSIONPASS_TRACEBACK", "1")
    status, _, err = run("report", f"{code}:{name}")
    assert status == 2 and "Traceback (most recent call last)" in err


def test_keyboard_interrupt_is_quiet(run, code):
    status, out, err = run("report", f"{code}:Interrupted")
    assert (status, out, err) == (130, "", "a print of the user's file\n")


# Help and rules


@pytest.mark.parametrize("words", [["--help"], ["report", "--help"], ["rules", "--help"]], ids=" ".join)
def test_help_teaches(run, words):
    status, out, _ = run(*words)
    assert status == 0
    if words[0] != "rules":
        assert "examples:" in out and "exit codes:" in out
    if words[0] == "report":
        assert "Which targets run code: file.py:name and package.module:name run that Python code" in out


def test_version(run):
    from fusionpass import __version__

    assert run("--version") == (0, f"fusionpass {__version__}\n", "")


def test_rules_names_every_rule_and_code(run):
    texts = {style: run("rules", "--format", style)[1] for style in ("table", "markdown", "json")}
    for text in texts.values():
        for rule in catalog():
            assert rule.name in text
            assert all(code in text for code in rule.codes)
    assert [rule["name"] for rule in json.loads(texts["json"])["rules"]] == [rule.name for rule in catalog()]
    assert max(map(len, texts["table"].splitlines())) <= 120


# Progress


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


# In a process of its own


def command(*words, **more):
    return [sys.executable, "-m", "fusionpass", *words], {
        "capture_output": True,
        "text": True,
        "timeout": 120,
        **more,
    }


def test_json_alone_on_standard_output():
    pytest.importorskip("transformers")
    words, more = command("report", "qwen3_next", "--layers", "2", "--format", "json")
    done = subprocess.run(words, **more)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)["rewrites"]) == 2


def test_bad_input_in_a_process():
    words, more = command("report", "no_such.py:Block")
    done = subprocess.run(words, **more)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_a_reader_that_stops_early_is_no_error():
    words, more = command("rules")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(words, **{**more, "capture_output": False, "stdout": writing, "stderr": subprocess.PIPE})
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


# --verify


def test_verify_says_what_it_held(run, code):
    status, out, err = run("report", f"{code}:Combine", "--verify")
    assert status == 0 and "1 rewritten" in out
    assert "note: verified: 1 rewritten site computed what the replaced nodes do" in err


@pytest.mark.parametrize("exported", [False, True], ids=["code", "archive"])
def test_verify_exits_1_when_a_site_differs(run, code, monkeypatch, tmp_path, exported):
    from fusionpass.rules import replace

    build = replace.call_of

    def mistaken(site, operand):
        exchanged = {**site.operands, "a": site.operands["b"], "b": site.operands["a"]}
        return build(site.changed(operands=exchanged), operand)

    target = f"{code}:Combine"
    if exported:
        target = str(tmp_path / "program.pt2")
        args = (torch.ones(4, 8), torch.ones(4, 1), torch.ones(4, 8))
        scope = {}
        exec(CODE, scope)
        torch.export.save(torch.export.export(scope["Combine"](), args), target)
    monkeypatch.setattr(replace, "call_of", mistaken)
    status, out, err = run("report", target, "--verify")
    assert status == 1, err
    assert "verify: site add" in err and "Traceback" not in err
