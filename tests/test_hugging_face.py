"""Hugging Face's ways: generate with a CompileConfig, a fused model that moves, adapters on the gate, quantised weights."""

import copy

import models
import pytest
import torch
import torch.nn.functional as F
from programs import DEVICE, WHOLE, assert_no_less_exact, stops, tensors, true_outputs

import fusionpass

transformers = pytest.importorskip("transformers")

LAYERS = 2


def compile_config(**settings):
    config = transformers.CompileConfig(**{"backend": "fusionpass", **settings})
    config._compile_all_devices = True  # generate compiles on accelerators alone, otherwise
    return config


CONFIGS = {
    "options": dict(mode=None, options={"inner": "eager", "strict": True}, fullgraph=False),
    "the default mode, which is reduce-overhead": dict(fullgraph=False),
    "a mode as an option": dict(mode=None, options={"mode": "reduce-overhead", "strict": True}, fullgraph=False),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_generate_with_a_compile_config(config):
    if DEVICE == "cpu" and config != "options":
        pytest.skip("Inductor compiles a model for half a minute on a CPU")
    model, inputs = models.build("qwen2_moe")
    options = dict(max_new_tokens=4, do_sample=False, cache_implementation="static")
    want = model.generate(inputs["input_ids"], **options, disable_compile=True)
    with fusionpass.collect() as report:
        got = model.generate(inputs["input_ids"], **options, compile_config=compile_config(**CONFIGS[config]))
    assert [site.stages for site in report.rewrites][:LAYERS] == [WHOLE] * LAYERS
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("backend", "family", "layers"),
    [
        ("eager", "qwen2_moe", LAYERS),
        ("aot_eager", "qwen2_moe", LAYERS),
        ("aot_eager", "qwen3_next", 1),  # the layer whose attention is no recurrence
        ("aot_eager", "qwen3_5_moe", 1),
    ],
)
def test_a_fused_model_generates_with_somebodys_backend(backend, family, layers):
    """`generate` compiles the decode steps by itself; the prefill is the fused model's own compilation."""
    model, inputs = models.build(family, layers=layers)
    options = dict(max_new_tokens=4, do_sample=False, cache_implementation="static")
    want = model.generate(inputs["input_ids"], **options, disable_compile=True)
    fusionpass.fuse(model, strict=True)
    config = compile_config(backend=backend, mode=None, fullgraph=True)
    with fusionpass.collect() as report:
        got = model.generate(inputs["input_ids"], **options, compile_config=config)
    assert [graph.rewrites for graph in report.graphs] == [layers] * 2
    assert [graph.calls for graph in report.graphs] == [1, 3]
    assert [site.stages for site in report.rewrites] == [WHOLE] * layers * 2
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("order", ["fused, then moved", "moved, then fused"])
def test_a_fused_model_moves(order):
    """To another dtype here, to a GPU where there is one: parameters are looked up when the forward is compiled."""
    model, inputs = models.build("qwen2_moe")
    model = model.cpu()
    want = copy.deepcopy(model).to(DEVICE, torch.bfloat16)(**inputs).logits
    if order == "fused, then moved":
        model = fusionpass.fuse(model).to(DEVICE).to(torch.bfloat16)
    else:
        model = fusionpass.fuse(model.to(torch.bfloat16).to(DEVICE))
    with torch.no_grad(), fusionpass.collect() as report:
        got = model(**inputs).logits
    assert [site.dtype for site in report.rewrites] == ["bfloat16"] * LAYERS
    assert got.dtype == torch.bfloat16 and got.device.type == DEVICE
    torch.testing.assert_close(got.float(), want.float(), rtol=0.1, atol=0.1)


def test_a_fused_model_that_ran_moves():
    model, inputs = models.build("qwen2_moe")
    fusionpass.fuse(model)
    with torch.no_grad():
        first = model(**inputs).logits
        model.to(torch.bfloat16)
        second = model(**inputs).logits
    assert (first.dtype, second.dtype) == (torch.float32, torch.bfloat16)


def test_a_fused_model_saves_and_loads(tmp_path):
    model, inputs = models.build("qwen2_moe")
    with torch.no_grad():
        want = model(**inputs).logits
        fusionpass.fuse(model).save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).to(DEVICE)
        torch.testing.assert_close(loaded(**inputs).logits, want)


class Adapted(torch.nn.Module):
    """A linear layer with a low-rank adapter, as PEFT's LoRA computes it."""

    def __init__(self, base: torch.nn.Linear):
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, 2, bias=False, device=base.weight.device)
        self.up = torch.nn.Linear(2, base.out_features, bias=False, device=base.weight.device)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x)) * 0.5


class Int8(torch.nn.Module):
    """A linear layer whose weight is stored in 8 bits."""

    def __init__(self, base: torch.nn.Linear):
        super().__init__()
        weight = base.weight.detach()
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (weight / self.scale).round().to(torch.int8))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


ALL_BUT_GATE = [stage for stage in WHOLE if stage != "gate_projection"]
# what replaces the modules of that name -> stages of each site, why the gate's projection stays
REPLACED = {
    "adapter on the gate": ("shared_expert_gate", Adapted, ALL_BUT_GATE, "not-a-projection"),
    "adapter on the shared expert": ("shared_expert.down_proj", Adapted, WHOLE, None),
    "8-bit gate": ("shared_expert_gate", Int8, WHOLE, None),
    "8-bit shared expert": ("shared_expert.down_proj", Int8, WHOLE, None),
}


@pytest.mark.parametrize(("path", "kind", "stages", "code"), REPLACED.values(), ids=REPLACED)
def test_adapters_and_quantised_layers(path, kind, stages, code):
    model, inputs = models.build("qwen2_moe", experts="batched_mm")
    for layer in model.model.layers:
        parent, _, name = path.rpartition(".")
        owner = layer.mlp.get_submodule(parent)
        setattr(owner, name, kind(getattr(owner, name)))
    with torch.no_grad():
        eager, truth = tensors(model(**inputs)), true_outputs(model, (), inputs)
        report = fusionpass.explain(model)(**inputs)
        got = tensors(fusionpass.fuse(model)(**inputs))
    assert [site.stages for site in report.rewrites] == [stages] * LAYERS
    assert [stops(site).get("gate_projection") for site in report.rewrites] == [code] * LAYERS
    assert_no_less_exact(got, eager, truth)


def test_peft():
    """A LoRA adapter on gate and shared expert, trained weights or none: refused at the gate, by name."""
    peft = pytest.importorskip("peft")
    model, inputs = models.build("qwen2_moe", experts="batched_mm")
    adapter = peft.LoraConfig(target_modules=["shared_expert_gate", "down_proj"], init_lora_weights=False, r=2)
    model = peft.get_peft_model(model, adapter).eval()
    with torch.no_grad():
        want = model(**inputs).logits
        report = fusionpass.explain(model)(**inputs)
        assert [site.stages for site in report.rewrites] == [ALL_BUT_GATE] * LAYERS
        assert {stops(site)["gate_projection"] for site in report.rewrites} == {"not-a-projection"}
        torch.testing.assert_close(fusionpass.fuse(model)(**inputs).logits, want, rtol=1e-3, atol=1e-4)
