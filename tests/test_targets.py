"""What each kind of target resolves to, and the one sentence for each that does not."""

import json
import sys
import textwrap

import pytest
import torch

from fusionpass.targets import Target, TargetError, resolve
from fusionpass.targets.config import cut_layers
from fusionpass.targets.inputs import from_spec

transformers = pytest.importorskip("transformers")

CODE = """
    import torch

    class Block(torch.nn.Module):
        def __init__(self, hidden=8):
            super().__init__()
            self.gate = torch.nn.Linear(hidden, 1)

        def forward(self, a, x, b):
            return a + torch.sigmoid(self.gate(x)) * b

    class Sized(Block):
        def __init__(self, hidden):
            super().__init__(hidden)

    class Broken(torch.nn.Module):
        def __init__(self):
            raise RuntimeError("no such thing")

    class Plain:
        pass

    def combine(a, g, b):
        return a + torch.sigmoid(g) * b

    def no_inputs():
        return torch.ones(2)

    def make():
        return Block()

    def make_wide(hidden=16):
        return Block(hidden)

    instance = Block()
    number = 3
    {}
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A function that writes a module with the given last line and returns its path."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)

    def write(last="", name="block.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(CODE).format(last))
        return str(path)

    yield write
    for name in set(sys.modules) - before:
        if name in ("block", "broken", "nested_block") or name.startswith("_target_"):
            del sys.modules[name]


def complaint(target, **options):
    with pytest.raises(TargetError) as caught:
        resolve(target, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


# Hugging Face


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text"])
def test_a_model_type_is_built_from_its_config_without_weights(model_type):
    target = resolve(model_type, layers=2)
    assert isinstance(target, Target) and target.name == model_type
    tensors = [*target.model.parameters(), *target.model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {parameter.dtype for parameter in target.model.parameters()} == {torch.bfloat16}
    assert target.kwargs["input_ids"].shape == (1, 16)
    assert not target.model.training
    assert len(target.model.model.layers) == 2
    assert target.on_meta


def test_full_size_costs_no_memory():
    target = resolve("qwen3_next")
    assert sum(parameter.numel() for parameter in target.model.parameters()) > 79e9
    assert len(target.model.model.layers) == 48


def test_sizes_dtype_and_device():
    target = resolve("gpt2", layers=1, tokens=5, batch=3, dtype="fp32", device="cpu")
    assert target.kwargs["input_ids"].shape == (3, 5)
    assert next(target.model.parameters()).dtype == torch.float32
    assert next(target.model.parameters()).device.type == "cpu"
    assert not target.on_meta


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_5_moe"])  # the latter's are a part's, its text model's
def test_the_experts_implementation(model_type):
    model = resolve(model_type, layers=1, experts="batched_mm").model
    assert {config._experts_implementation for config in (model.config, model.config.get_text_config())} == {
        "batched_mm"
    }


def test_experts_that_cannot_be_had():
    text = complaint("qwen2_moe", layers=1, experts="fast")
    assert "--experts 'fast' is unknown to transformers" in text and "batched_mm, " in text
    assert "--experts batched_mm has no effect on 'llama'" in complaint("llama", layers=1, experts="batched_mm")
    assert "--experts has no effect on 'm.pt2'" in complaint("m.pt2", experts="eager")


def test_the_first_layers_keep_their_pattern():
    config = transformers.AutoConfig.for_model("qwen3_next")
    pattern = list(config.layer_types)
    cut_layers(config, 6, "qwen3_next")
    assert config.num_hidden_layers == 6
    assert config.layer_types == pattern[:6]
    assert len(set(config.layer_types)) == 2


def test_the_text_part_of_a_composite_config_is_cut():
    config = transformers.AutoConfig.for_model("qwen3_5_moe")
    depth = config.vision_config.depth
    cut_layers(config, 3, "qwen3_5_moe")
    assert config.text_config.num_hidden_layers == len(config.text_config.layer_types) == 3
    assert config.vision_config.depth == depth


def test_shared_key_value_layers_stay_the_last_ones():
    config = transformers.AutoConfig.for_model("gemma3n_text")  # layers 20 to 34 read the keys of others
    cut_layers(config, 22, "gemma3n_text")
    assert config.num_kv_shared_layers == 2
    cut_layers(config, 4, "gemma3n_text")
    assert config.num_kv_shared_layers == 0


def test_a_talker_takes_embeddings_and_says_what_was_filled_in():
    target = resolve("qwen3_omni_moe_talker_text", layers=1, tokens=4)
    assert target.kwargs["inputs_embeds"].shape == (1, 4, 1024)
    assert "shared_expert_intermediate_size=768" in target.notes[0]


def test_an_encoder_decoder_gets_both_inputs():
    assert set(resolve("t5", layers=1).kwargs) == {"input_ids", "decoder_input_ids"}


def test_a_folder_is_built_from_its_config(tmp_path):
    config = transformers.AutoConfig.for_model("qwen2_moe", num_hidden_layers=3, hidden_size=64)
    config.save_pretrained(tmp_path)
    target = resolve(str(tmp_path))
    assert len(target.model.model.layers) == 3
    assert target.model.config.hidden_size == 64


def test_an_unknown_type_lists_close_ones_and_where_to_see_all():
    text = complaint("qwen3-nxt")
    assert "'qwen3-nxt'" in text and "qwen3_next" in text and "CONFIG_MAPPING" in text


def test_a_type_never_reaches_the_network(monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    resolve("qwen2_moe", layers=1)
    complaint("no_such_type")


def test_a_hub_id_that_cannot_be_had(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "'nobody/nothing'" in complaint("nobody/nothing")


def test_transformers_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    text = complaint("qwen3_next")
    assert "transformers is not installed" in text and 'pip install "fusionpass[hf]"' in text


def test_weights_that_do_not_fit_are_refused():
    assert "GB are free" in complaint("qwen3_next", device="cpu")


CONFIGS = {
    "broken JSON": ("{", "could not be read as JSON"),
    "no object": ("[1]", "names no model_type"),
    "no model_type": ("{}", "names no model_type"),
    "unknown model_type": (json.dumps({"model_type": "qwen2_mo"}), "qwen2_moe"),
    "refused value": (json.dumps({"model_type": "qwen2_moe", "hidden_size": "many"}), "was refused by transformers"),
    "own code": (
        json.dumps(
            {"model_type": "odd", "auto_map": {"AutoConfig": "odd.Config", "AutoModelForCausalLM": "odd.Model"}}
        ),
        "--trust-remote-code",
    ),
}


@pytest.mark.parametrize("content, words", CONFIGS.values(), ids=CONFIGS)
def test_a_bad_config(tmp_path, content, words):
    (tmp_path / "config.json").write_text(content)
    assert words in complaint(str(tmp_path))


def test_remote_code_runs_only_when_trusted(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "odd.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise RuntimeError('odd')\n")
    (tmp_path / "config.json").write_text(CONFIGS["own code"][0])
    complaint(str(tmp_path))
    assert not marker.exists()
    complaint(str(tmp_path), trust_remote_code=True)
    assert marker.exists()


HUGGING_FACE_COMPLAINTS = {
    "no forward": ("qwen3_omni_moe", {}, "qwen3_omni_moe_talker_text"),
    "no layer count": ("qwen3_omni_moe", {"layers": 2}, "qwen3_omni_moe_talker_text"),
    "images": ("blip", {}, "needs pixel_values"),
    "no text": ("vit", {}, "takes no input_ids"),
    "too many layers": ("qwen3_next", {"layers": 49}, "'qwen3_next' has 48"),
    "incomplete default": ("dots1", {}, "give a folder with a complete config.json"),
    "input": ("qwen3_next", {"input_specs": ["bf16[2]"]}, "--input has no effect"),
    "dtype": ("qwen3_next", {"dtype": "int8"}, "allowed are bf16, fp16, fp32"),
    "layers": ("qwen3_next", {"layers": 0}, "layers is 0"),
    "tokens": ("qwen3_next", {"tokens": -1}, "tokens is -1"),
    "device": ("qwen3_next", {"device": "abacus"}, "'abacus'"),
    "empty": ("", {}, "the target is empty"),
    "no folder": ("./no/such/folder", {}, "'./no/such/folder'"),
}


@pytest.mark.parametrize("target, options, words", HUGGING_FACE_COMPLAINTS.values(), ids=HUGGING_FACE_COMPLAINTS)
def test_hugging_face_complaints(target, options, words):
    assert words in complaint(target, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("target", ["qwen3_next", "math:sqrt"])
def test_cuda_without_a_gpu(target):
    assert "no CUDA GPU" in complaint(target, device="cuda", input_specs=["fp32[2]"] if ":" in target else None)


# Python code

RESOLVES = {
    "instance": ("instance", "Block"),
    "class": ("Block", "Block"),
    "factory": ("make", "Block"),
    "factory with defaults": ("make_wide", "Block"),
    "function": ("combine", "function"),
}


@pytest.mark.parametrize("name, kind", RESOLVES.values(), ids=RESOLVES)
def test_python_targets(code, name, kind):
    target = resolve(f"{code('example_inputs = (torch.ones(4, 8),) * 3')}:{name}")
    assert type(target.model).__name__ == kind
    assert len(target.args) == 3 and not target.kwargs


def test_a_module_on_the_path(code, monkeypatch, tmp_path):
    code("example_inputs = (torch.ones(4, 8),) * 3", "nested_block.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert type(resolve("nested_block:Block").model).__name__ == "Block"


def test_a_function_of_no_inputs_is_captured_itself(code):
    target = resolve(f"{code()}:no_inputs")
    assert target.model.__name__ == "no_inputs" and target.args == ()


INPUTS = {
    "tuple": ("example_inputs = (torch.ones(4, 8),) * 3", 3, []),
    "list": ("example_inputs = [torch.ones(4, 8)] * 3", 3, []),
    "dict": ("example_inputs = dict(a=torch.ones(4, 8), g=torch.ones(4, 1), b=torch.ones(4, 8))", 0, ["a", "g", "b"]),
    "function": ("example_inputs = lambda: (torch.ones(4, 8),) * 3", 3, []),
    "on the function": ("combine.example_inputs = (torch.ones(4, 8),) * 3", 3, []),
}


@pytest.mark.parametrize("last, positional, named", INPUTS.values(), ids=INPUTS)
def test_example_inputs(code, last, positional, named):
    target = resolve(f"{code(last)}:combine")
    assert len(target.args) == positional and list(target.kwargs) == named


def test_input_specs_take_the_place_of_example_inputs(code):
    path = code("example_inputs = ()")
    target = resolve(f"{path}:combine", input_specs=["bf16[64,2048]", "bf16[64,1]", "bf16[64,2048]"])
    assert [tuple(value.shape) for value in target.args] == [(64, 2048), (64, 1), (64, 2048)]
    assert {value.dtype for value in target.args} == {torch.bfloat16}


def test_device_and_dtype_move_module_and_inputs(code):
    target = resolve(f"{code('example_inputs = (torch.ones(4, 8),) * 3')}:Block", device="meta", dtype="bf16")
    for value in (*target.model.parameters(), *target.args):
        assert value.device.type == "meta" and value.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "spec, dtype, shape",
    [("bf16[2,3]", torch.bfloat16, (2, 3)), (" i64 [ 4 ] ", torch.int64, (4,)), ("bool[]", torch.bool, ())],
)
def test_specs(spec, dtype, shape):
    value = from_spec(spec, torch.device("cpu"))
    assert (value.dtype, tuple(value.shape)) == (dtype, shape)


PYTHON_COMPLAINTS = {
    "missing name": ("comb", "", "combine"),
    "no module": ("number", "", "is of type int"),
    "plain class": ("Plain", "", "no nn.Module"),
    "class with arguments": ("Sized", "", "needs hidden"),
    "constructor fails": ("Broken", "", "RuntimeError: no such thing"),
    "no inputs": ("combine", "", "--input"),
    "inputs of no kind": ("combine", "example_inputs = 3", "is of type int"),
    "inputs do not fit": ("combine", "example_inputs = (torch.ones(2),)", "does not fit|do not fit"),
    "inputs fail": ("combine", "def example_inputs(): raise KeyError('x')", "KeyError"),
    "file fails": ("combine", "raise OSError('first\\nsecond')", "OSError: first"),
    "file exits": ("combine", "raise SystemExit(3)", "SystemExit"),
    "no syntax": ("combine", "def", "SyntaxError"),
    "no name": ("", "", "FILE.py:NAME"),
}


@pytest.mark.parametrize("name, last, words", PYTHON_COMPLAINTS.values(), ids=PYTHON_COMPLAINTS)
def test_python_complaints(code, name, last, words):
    text = complaint(f"{code(last)}:{name}")
    assert any(word in text for word in words.split("|")), text


BAD_SPECS = ["bf16", "bf16[2", "bf16[a]", "bf16[-1]", "int7[2]", "bf16[2,,3]", "fp32[999999,999999,9999]"]


@pytest.mark.parametrize("spec", BAD_SPECS)
def test_bad_specs(code, spec):
    assert repr(spec) in complaint(f"{code()}:combine", input_specs=[spec] * 3)


PATH_COMPLAINTS = {
    "missing file": ("no_such.py:Block", {}, "no file 'no_such.py'"),
    "missing module": ("no_such_module:Block", {}, "no module 'no_such_module'"),
    "missing parent": ("no.such.module:Block", {}, "no module 'no.such.module'"),
    "file without a name": ("no_such.py", {}, "no_such.py:NAME"),
    "layers": ("no_such.py:Block", {"layers": 2}, "--layers has no effect"),
    "missing archive": ("no_such.pt2", {}, "no archive 'no_such.pt2'"),
    "archive and device": ("no_such.pt2", {"device": "cpu"}, "--device has no effect"),
}


@pytest.mark.parametrize("target, options, words", PATH_COMPLAINTS.values(), ids=PATH_COMPLAINTS)
def test_path_complaints(target, options, words):
    assert words in complaint(target, **options)


def test_a_file_of_no_known_kind(tmp_path):
    path = tmp_path / "weights.bin"
    path.touch()
    assert "no known kind" in complaint(str(path))


# Archives


def test_an_archive(tmp_path):
    class Combine(torch.nn.Module):
        def forward(self, a, g, b):
            return a + torch.sigmoid(g) * b

    program = torch.export.export(Combine(), (torch.ones(4, 8), torch.ones(4, 1), torch.ones(4, 8)))
    torch.export.save(program, tmp_path / "combine.pt2")
    target = resolve(str(tmp_path / "combine.pt2"))
    assert isinstance(target.program, torch.export.ExportedProgram)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x05\x06" + bytes(18)], ids=["empty", "text", "empty zip"])
def test_a_broken_archive(tmp_path, content):
    path = tmp_path / "broken.pt2"
    path.write_bytes(content)
    assert "torch.export.load" in complaint(str(path))
