"""Bad input to the command: exit code 2 and one line."""

import os
import sys

import cli_helpers
import pytest
import torch

code = cli_helpers.code
run = cli_helpers.run
refused = cli_helpers.refused

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
