"""Wrong input to the command: one sentence on standard error that restates it and says what to do, exit code 2."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import zipfile

import pytest

from fusionpass.cli import main

CODE = """
import sys
import torch

class Block(torch.nn.Module):
    def __init__(self, hidden=8):
        super().__init__()
        self.gate, self.up = torch.nn.Linear(hidden, 1), torch.nn.Linear(hidden, hidden)

    def forward(self, x):
        return x + torch.sigmoid(self.gate(x)) * self.up(x)

class Needs(Block):
    def __init__(self, hidden, *, k):
        super().__init__(hidden)

class Exits(Block):
    def __init__(self):
        sys.exit(3)

class ExitsInForward(torch.nn.Module):
    def forward(self, x):
        sys.exit("enough")

class Stops(torch.nn.Module):
    def forward(self, x):
        raise BaseException("stop")

class NoForward(torch.nn.Module):
    pass

class Recurses(torch.nn.Module):
    def forward(self, x):
        return self(x)

class Plain:
    pass

def takes_two(x, y):
    return x + y

number = 3
"""
FILES = {
    "good.py": CODE,
    "missing_import.py": "import no_such_package",
    "syntax.py": "def f(:",
    "exits.py": "import sys; sys.exit('bye')",
    "base.py": "raise BaseException('odd')",
    "zero.py": "1 / 0",
    "empty.py": "",
    "three.py": "example_inputs = (1, 2, 3)\ndef f(x): return x",
    "raising.py": "def example_inputs(): raise ValueError('first\\nsecond')\ndef f(x): return x",
    "odd.py": "example_inputs = 3\ndef f(x): return x",
    "run.json": "{",
    "empty.pt2": "",
    "text.pt2": "no archive",
}
CONFIGS = {
    "abc": {"model_type": "qwen2_moe", "hidden_size": "abc"},
    "negative": {"model_type": "qwen2_moe", "hidden_size": -5},
    "null": {"model_type": "qwen2_moe", "hidden_size": None},
    "float": {"model_type": "qwen2_moe", "hidden_size": 12.5},
    "huge": {"model_type": "qwen2_moe", "hidden_size": 10**21},
    "list": ["qwen2_moe"],
    "no_type": {"hidden_size": 8},
    "odd_type": {"model_type": ["qwen2_moe"]},
    "unknown_type": {"model_type": "nosuch_model"},
}
HUGE = "9" * 20
SPEC = '--input "f32[2,8]"'
# command line -> what its one line must say
LINES = {
    # inputs that the module does not take
    'report good.py:Block --input "bf16[2,8]" --diff': '--input "bf16[2,8]" cannot be captured & write --input "fp32[2,8]" '
    "& or give --dtype bf16",
    'report good.py:Block --input "i64[2,8]"': 'parameters are float32, so write --input "fp32[2,8]"',
    'report good.py:Block --input "bool[2,8]"': 'so write --input "fp32[2,8]"',
    'report good.py:Block --dtype fp32 --input "bf16[2,8]"': '--dtype fp32 --input "bf16[2,8]" & or give --dtype bf16',
    'report good.py:Block --dtype bf16 --input "f32[2,8]"': 'parameters are bfloat16, so write --input "bf16[2,8]"',
    'report good.py:Block --input "f32[2,9]"': '"f32[2,9]" cannot be captured & at good.py:',
    'report good.py:Block --input "f32[]"': '"f32[]" cannot be captured',
    f"report good.py:Block {SPEC} {SPEC}": "was given 2 inputs, which do not fit",
    "report good.py:takes_two " + SPEC: "was given 1 input, which does not fit its signature: missing",
    'report good.py:takes_two --input "f32[2]" --input "f32[3]"': '--input "f32[3]" cannot be captured',
    # sizes and dtypes of --input
    f'report good.py:Block --input "f32[{HUGE}9,8]"': f"--input 'f32[{HUGE}9,8]' is too large & make it smaller",
    f'report good.py:Block --input "f32[{"9" * 5000}]"': "--input 'f32[999 & is too large",
    'report good.py:Block --input "f32[0,99999999999999999999]"': "--input & is too large",
    'report good.py:Block --input "f32[9999999999,9999999999]"': "--input & is too large & at most 2^63 bytes",
    'report good.py:Block --input "f32[999999999999,8]"': "--input & are free on cpu & or add --device meta",
    'report good.py:Block --input "f32[-1,8]"': "--input 'f32[-1,8]' is no dtype[sizes]",
    'report good.py:Block --input "f32[1.5]"': "--input 'f32[1.5]' is no dtype[sizes]",
    'report good.py:Block --input "f32[2,8"': "--input 'f32[2,8' is no dtype[sizes]",
    'report good.py:Block --input ""': "--input '' is no dtype[sizes]: write for example",
    'report good.py:Block --input "q8[2,8]"': "'q8[2,8]' has the unknown dtype 'q8': use one of bf16",
    "report good.py:Block": 'has no inputs & --input "bf16[64,2048]"',
    # numbers
    f"report qwen2_moe --tokens {HUGE}": f"--tokens: '{HUGE}' is too large",
    f"report qwen2_moe --batch {HUGE}": "argument --batch & is too large",
    f"report qwen2_moe --layers {HUGE}": "argument --layers & is too large",
    f"report qwen2_moe --expect {HUGE}": "argument --expect & is too large",
    f"report qwen2_moe --tokens {'9' * 5000}": "argument --tokens: '999 & is too large",
    "report qwen2_moe --tokens 0": "--tokens: '0' is not a whole number from 1 up",
    "report qwen2_moe --tokens -4": "--tokens: '-4' is not",
    "report qwen2_moe --tokens 1.5": "--tokens: '1.5' is not",
    "report qwen2_moe --tokens 1e3": "--tokens: '1e3' is not",
    'report qwen2_moe --batch ""': "--batch: '' is not",
    "report qwen2_moe --batch \u0663": "--batch: & is not a whole number",
    "report qwen2_moe --layers nan": "--layers: 'nan' is not",
    "report qwen2_moe --layers": "--layers: expected one argument",
    "report qwen2_moe --expect -1": "--expect: '-1' is not a whole number from 0 up",
    "report qwen2_moe --batch 1000000000000": "--batch 1000000000000 --tokens 16 makes 16,000,000,000,000 tokens & smaller",
    "report qwen2_moe --tokens 999999999999": "--tokens 999999999999 makes & smaller",
    "report qwen2_moe --batch 100000 --tokens 20000 --device cpu": "--batch 100000 --tokens 20000 is too large & free",
    # words that are none of a closed list
    f"report good.py:Block {SPEC} --format yaml": "--format & 'yaml'",
    f"report good.py:Block {SPEC} --dtype float8": "--dtype & 'float8'",
    f"report good.py:Block {SPEC} --numerics ''": "--numerics & ''",
    f"report good.py:Block {SPEC} --inner nope": "'inner' is 'nope': allowed are aot_eager, & eager, inductor",
    f"report good.py:Block {SPEC} --inner ''": "'inner' is ''",
    f"report good.py:Block {SPEC} --inner tvm": "--inner tvm cannot be captured & the inner compiler failed: ",
    f"report good.py:Block {SPEC} --inner fusionpass": "'fusionpass' itself",
    f"report good.py:Block {SPEC} --rules nope": "'rules' names 'nope'",
    f"report good.py:Block {SPEC} --rules ''": "without 'gated_add'",
    f"report good.py:Block {SPEC} --device nope": "device 'nope' is unknown to torch",
    f"report good.py:Block {SPEC} --device fpga": "device 'fpga' was asked for, and torch makes no tensor there",
    "report qwen2_moe --experts nope": "--experts 'nope' is unknown to transformers",
    # options and commands that do not exist
    "report good.py:Block --nope": "unrecognized arguments: --nope; see fusionpass report --help",
    "report good.py:Block more": "unrecognized arguments: more; see fusionpass report --help",
    "rules --nope": "unrecognized arguments: --nope; see fusionpass rules --help",
    "bench --nope": "unrecognized arguments: --nope; see fusionpass bench --help",
    "--nope": "see fusionpass --help",
    "diff run.json run.json": "'diff'",
    # files of Python
    "report missing_import.py:f": "'missing_import.py' failed with ModuleNotFoundError & no_such_package",
    "report syntax.py:f": "'syntax.py' failed with SyntaxError & line 1",
    "report exits.py:f": "'exits.py' failed with SystemExit: bye",
    "report base.py:f": "'base.py' failed with BaseException: odd",
    "report zero.py:f": "'zero.py' failed with ZeroDivisionError",
    "report binary.py:f": "'binary.py' failed with",
    "report empty.py:f": "'empty.py:f' names 'f', which is not there",
    "report good.py:Blok": "'Blok', which is not there: it has Block",
    "report good.py:Block.nope": "'nope', which is not there",
    "report good.py:": "'good.py:' does not say what to capture",
    "report good.py": "write good.py:NAME",
    "report no/such.py:f": "there is no file 'no/such.py'",
    "report folder.py:f": "there is no file 'folder.py'",
    "report no_such_module:f": "there is no module 'no_such_module'",
    "report good.py:Needs": "is a class that needs hidden, k: name a function",
    "report good.py:Exits": "failed with SystemExit: 3",
    f"report good.py:ExitsInForward {SPEC}": "cannot be captured: SystemExit: enough",
    f"report good.py:Stops {SPEC}": "cannot be captured: BaseException: stop",
    f"report good.py:NoForward {SPEC}": "NoForward, which has no forward: name",
    f"report good.py:Recurses {SPEC}": "cannot be captured: & recursion",
    "report good.py:Plain": "is the class Plain, no nn.Module",
    "report good.py:number": "is of type int",
    "report three.py:f": "was given 3 inputs, which do not fit",
    "report raising.py:f": "example_inputs could not be called: ValueError: first second",
    "report odd.py:f": "example_inputs is of type int",
    "report good.py:Block --tokens 4": "--tokens has no effect on 'good.py:Block'",
    # archives
    "report no.pt2": "there is no archive 'no.pt2'",
    "report empty.pt2": "'empty.pt2' could not be read & torch.export.save",
    "report text.pt2": "'text.pt2' could not be read & torch.export.save",
    "report other.pt2": "'other.pt2' could not be read & torch.export.save",
    "report folder.pt2": "there is no archive 'folder.pt2'",
    "report empty.pt2 --device cpu": "--device has no effect on 'empty.pt2'",
    # folders and types
    "report abc": "'hidden_size' & expected int, got str (value: 'abc') & correct it there",
    "report float": "expected int, got float (value: 12.5)",
    "report null": "expected int, got NoneType",
    "report negative": "'negative' could not be built & -5",
    "report huge": "'huge' could not be built",
    "report list": "names no model_type",
    "report no_type": "names no model_type",
    "report odd_type": "model_type ['qwen2_moe'], unknown to transformers",
    "report unknown_type": "model_type 'nosuch_model', unknown",
    "report empty_config": "could not be read as JSON (it is empty): correct it",
    "report binary_config": "could not be read as JSON",
    "report deep_config": "could not be read as JSON",
    "report folder_config": "could not be read as JSON (Is a directory)",
    "report no_config.py/": "has no config.json",
    "report run.json": "is a file of no known kind",
    "report ./none": "there is no file or folder './none'",
    "report ''": "the target is empty: name",
    "report nosuch_model": "'nosuch_model' is no model type of transformers & see all with",
    "report qwen3_nxt": "did you mean qwen3_next",
    "report qwen3next": "did you mean qwen3_next",
    # where the report goes
    f"report good.py:Block {SPEC} -o no/r.json": "-o 'no/r.json' cannot be written: there is no folder 'no', make it first",
    f"report good.py:Block {SPEC} -o folder.py": "-o 'folder.py' cannot be written: it is a folder",
    f"report good.py:Block {SPEC} -o run.json/r": "-o 'run.json/r' cannot be written: there is no folder",
    f"report good.py:Block {SPEC} -o {'x' * 300}.json": "cannot be written: file name too long, name another file",
    f"report good.py:Block {SPEC} -o ''": "-o '' is empty: name a file",
    # bench
    "bench --tokens 0": "--tokens: '0' is not a list of whole numbers",
    "bench --hidden 1,,2": "--hidden: '1,,2' is not a list",
    f"bench --tokens {HUGE}": "--tokens & is too large",
    "bench --batch -1": "--batch: '-1' is not a list",
    "bench --rounds 1": "--rounds: '1' is not a whole number from 2 up: one sample has no spread",
    "bench --sets 0": "--sets: '0' is not",
    "bench --tolerance 5": "--tolerance: '5' is neither",
    "bench --op nope": "--op 'nope' is unknown",
    "bench --json ''": "--json: the name is empty",
    "bench --json no/run.json": "--json 'no/run.json' cannot be written: there is no folder",
    "bench --check no.json": "--check 'no.json' cannot be read: ",
    "bench --check run.json": "--check 'run.json' cannot be used: it is not JSON",
    "bench --from folder.py": "--from 'folder.py' cannot be read: ",
}
NEEDS_TRANSFORMERS = [*CONFIGS, "qwen", "nosuch", "_config"]
UNLIKE = ("neucodec",)  # what no such name may be taken for


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wrong")
    for name, text in FILES.items():
        (path / name).write_text(text)
    for name, config in CONFIGS.items():
        (path / name).mkdir()
        (path / name / "config.json").write_text(json.dumps(config))
    for name, content in (("empty", b""), ("binary", bytes(range(128, 192))), ("deep", b"[" * 100_000)):
        (path / f"{name}_config").mkdir()
        (path / f"{name}_config" / "config.json").write_bytes(content)
    (path / "folder_config" / "config.json").mkdir(parents=True)
    for name in ("folder.py", "folder.pt2", "no_config.py"):
        (path / name).mkdir()
    (path / "binary.py").write_bytes(b"\x00\xff\xfe")
    with zipfile.ZipFile(path / "other.pt2", "w") as archive:
        archive.writestr("a", "b")
    return path


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(folder) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[:70])
def test_one_sentence(capsys, line):
    if any(word in line for word in NEEDS_TRANSFORMERS):
        pytest.importorskip("transformers")
    status = main(shlex.split(line))
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and err.endswith("\n") and err.startswith("fusionpass")
    assert "Traceback" not in err and len(err) < 1000
    for words in LINES[line].split(" & "):
        assert words in err
    assert not any(word in err for word in UNLIKE)


def test_there_are_many():
    assert len(LINES) >= 60


# What a test inside this process cannot see.


def command(words, **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "fusionpass", *words], text=True, env=environment, **more)


def test_a_traceback_that_torch_prints_is_dropped_in_a_process(folder):
    words = ["report", "good.py:Block", "--input", "i64[2,8]"]
    out, err = (process := command(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder)).communicate()
    assert (process.returncode, out, err.count("\n")) == (2, "", 1), err


@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.5])
def test_ctrl_c_at_any_moment(folder, seconds):
    """While torch is imported, while the model is built, and while it is captured."""
    pytest.importorskip("transformers")
    words = ["report", "qwen3_next"]
    process = command(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "")
    assert process.returncode == 130


def test_ctrl_c_that_a_program_takes_for_its_own(folder):
    """`main` leaves with 130 even where the interrupt came out as another error."""
    (folder / "swallows.py").write_text(
        "import os, signal, torch\n"
        "class Block(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        try:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "        except KeyboardInterrupt:\n"
        "            raise RuntimeError('swallowed') from None\n"
    )
    assert main(["report", "swallows.py:Block"]) == 130


def test_a_program_of_the_users_keeps_its_ctrl_c():
    code = "import signal, fusionpass; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_a_full_disk_is_one_sentence():
    with open("/dev/full", "w") as full:
        process = command(["rules"], stdout=full, stderr=subprocess.PIPE)
        err = process.communicate()[1]
    assert process.returncode == 2 and err.count("\n") == 1
    assert "standard output cannot be written: no space left on device" in err


def test_a_read_only_file_system_is_called_so(capsys, monkeypatch):
    import builtins
    import errno

    real = builtins.open

    def read_only(path, *args, **kwargs):
        if str(path).endswith("r.md"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", read_only)
    assert main(["report", "good.py:Block", "--input", "f32[2,8]", "-o", "r.md"]) == 2
    assert "-o 'r.md' cannot be written: read-only file system, name another file" in capsys.readouterr().err


def test_the_probe_leaves_no_file_and_changes_none(folder):
    (folder / "kept.md").write_text("before")
    for name in ("kept.md", "fresh.md"):
        assert main(["report", "good.py:Blok", "-o", name]) == 2
    assert (folder / "kept.md").read_text() == "before"
    assert not (folder / "fresh.md").exists()
