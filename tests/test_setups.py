"""The set-ups in which people run models: each gets the sites of the plain model, and is no less exact than without us."""

from __future__ import annotations

import copy

import models
import pytest
import torch
from programs import DEVICE, SCATTER, WHOLE, relative_error

import fusionpass

transformers = pytest.importorskip("transformers")

# Of the last two the layer whose attention is no recurrence.
LAYERS = {"qwen2_moe": 2, "qwen3_next": 1, "qwen3_5_moe": 1}
TRAINED = ["gate_projection", "gated_add"]
PLAIN_GATE = ["finalize", "gated_add", "residual", "rms_norm"]  # the projection of a quantised gate stays outside
FAMILIES = list(LAYERS)
ATTENTION = ["q_proj", "v_proj", "in_proj_qkvz", "in_proj_qkv"]


def built(family, **how):
    return models.build(family, layers=LAYERS[family], **how)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def under_autocast(model, inputs):
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        return model(**inputs).logits


def quantised(config: str):
    """Every linear layer with torchao's weights, the gate included."""

    def change(model):
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model, getattr(quantization, config)())
        return model

    return change


def with_adapters(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=ATTENTION, task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    return peft.get_peft_model(model, config)


def on_one_device(model):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.dispatch_model(model, {"": DEVICE})


def as_it_is(model):
    return model


# what -> (the change to the model, the call, the stages of each layer)
INFERENCE = {
    "autocast": (as_it_is, under_autocast, WHOLE),
    "torchao, int8 weights": (quantised("Int8WeightOnlyConfig"), logits, PLAIN_GATE),
    "torchao, int8 weights and activations": (quantised("Int8DynamicActivationInt8WeightConfig"), logits, PLAIN_GATE),
    "torchao, float8 weights": (quantised("Float8WeightOnlyConfig"), logits, PLAIN_GATE),
    "PEFT": (with_adapters, logits, WHOLE),
    "accelerate, one device": (on_one_device, logits, WHOLE),
}


ONE_FAMILY = (
    "torchao, int8 weights and activations",
    "torchao, float8 weights",
)  # the same way through the pass as int8


@pytest.mark.parametrize(
    ("setup", "family"),
    [(setup, family) for setup in INFERENCE for family in (FAMILIES[:1] if setup in ONE_FAMILY else FAMILIES)],
)
def test_inference(setup, family):
    change, call, stages = INFERENCE[setup]
    dtype = torch.bfloat16 if setup.startswith("torchao") else torch.float32
    model, inputs = built(family, dtype=dtype)
    model = change(model)
    plain = call(model, inputs)
    with fusionpass.collect() as report:
        got = call(fusionpass.fuse(copy.copy(model)), inputs)
    assert [site.stages for site in report.rewrites] == [stages] * LAYERS[family]
    assert not report.misses
    # Quantised weights have no float64. There the two may differ by the rounding that the region has in bfloat16.
    close = {"rtol": 0.05, "atol": 0.05 * float(plain.float().abs().max())}
    torch.testing.assert_close(got, plain, **close)


def trained(model, inputs):
    model.zero_grad()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", FAMILIES)
def test_training_under_autocast(family):
    """Loss and gradients are no further from those of float64 than the same step without the pass."""
    model, inputs = built(family)
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("batched_mm")
    loss = exact(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    truth = [loss.detach(), *(p.grad for p in exact.parameters() if p.grad is not None)]
    plain = [t.clone() for t in trained(model, inputs)]
    with fusionpass.collect() as report:
        got = trained(fusionpass.fuse(model), inputs)
    assert [site.stages for site in report.rewrites] == [TRAINED] * LAYERS[family]
    assert len(got) == len(plain) == len(truth)
    assert relative_error(got, truth) <= SCATTER * relative_error(plain, truth)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trainer_in_bf16(family, tmp_path):
    """Two real steps: every parameter ends where it ends without the pass, but for rounding."""
    ended = []
    for fused in (False, True):
        model, inputs = built(family)
        ids = inputs["input_ids"][0]
        arguments = transformers.TrainingArguments(
            str(tmp_path / str(fused)), bf16=True, use_cpu=DEVICE == "cpu", max_steps=2, per_device_train_batch_size=2,
            learning_rate=1e-2, optim="sgd", report_to=[], disable_tqdm=True, save_strategy="no", logging_strategy="no",
        )  # fmt: skip
        data = [{"input_ids": ids, "labels": ids}] * 4
        with fusionpass.collect() as report:
            module = fusionpass.fuse(model) if fused else model
            transformers.Trainer(model=module, args=arguments, train_dataset=data).train()
        ended.append([p.detach().clone() for p in model.parameters()])
    assert [site.stages for site in report.rewrites] == [TRAINED] * LAYERS[family]
    assert report.executed == 2 * LAYERS[family]
    for one, other in zip(*ended, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize(
    ("what", "family"), [*(("SparseMoeBlock", family) for family in FAMILIES), ("DecoderLayer", FAMILIES[0])]
)
def test_a_fused_class_inside_torch_compile(what, family):
    """`fuse` on the class, then somebody's torch.compile of the whole model: one graph, every layer rewritten in it."""
    model, inputs = built(family)
    plain = logits(model, inputs)
    cls = type(next(module for module in model.modules() if type(module).__name__.endswith(what)))
    forward = cls.forward
    try:
        fusionpass.fuse(cls)
        with fusionpass.collect() as report:
            got = logits(torch.compile(model, backend="aot_eager"), inputs)
    finally:
        cls.forward = forward
    assert [site.stages for site in report.rewrites] == [WHOLE] * LAYERS[family]
    torch.testing.assert_close(got, plain, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_regional_compilation(family):
    """accelerate compiles each layer by itself, so the next layer's norm is not in the graph."""
    utils = pytest.importorskip("accelerate").utils
    model, inputs = built(family)
    plain = logits(model, inputs)
    with fusionpass.collect() as report:
        got = logits(utils.compile_regions(model, backend="fusionpass", options={"inner": "eager"}), inputs)
    assert {tuple(site.stages) for site in report.rewrites} == {tuple(WHOLE[:-1])}
    assert report.executed == LAYERS[family]
    torch.testing.assert_close(got, plain, rtol=2e-4, atol=2e-4)
