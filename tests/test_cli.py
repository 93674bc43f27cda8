"""The command: reports on standard output, expectations as exit codes, help, `--verify`."""

import json
import os
import subprocess
import sys

import cli_helpers
import pytest
import torch
from cli_helpers import CODE

from fusionpass.rules import catalog

code = cli_helpers.code
run = cli_helpers.run


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
    assert "expected 1 rewritten site, found 5 (1 captured, shared by layers)" in err


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


EXPECTATIONS = {
    "met": ("Combine", ["--expect", "1"], 0, ""),
    "zero met": ("Plain", ["--expect", "0"], 0, ""),
    "too few": (
        "Kept",
        ["--expect", "1"],
        1,
        "expected 1 rewritten site, found 0; 0 rewritten in 1 graph, 1 near miss: 1 x multi",
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
