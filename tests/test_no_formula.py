"""Models without the formula: nothing is rewritten, every bit stays, and one warning says so."""

from __future__ import annotations

import copy
import logging

import models
import pytest
import torch
from programs import DEVICE

import fusionpass

# Beside the common sizes. Eight of these have sigmoids of their own: as router scores (deepseek_v3, dots1, glm4_moe,
# lfm2_moe, llama4, minimax_m2), as the gate of attention (afmoe), as the activation of the experts (gpt_oss).
MODELS = {
    "afmoe": dict(num_dense_layers=1, layer_types=["sliding_attention", "full_attention"], head_dim=8),
    "bloom": {},
    "cohere2_moe": {},
    "deepseek_v3": dict(
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        num_key_value_heads=4,
        n_routed_experts=8,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "dots1": dict(n_routed_experts=8, n_shared_experts=1, n_group=2, topk_group=1, first_k_dense_replace=1),
    "ernie4_5_moe": dict(moe_num_experts=8, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=1),
    "flex_olmo": {},
    "gemma3_text": dict(layer_types=["sliding_attention", "full_attention"], sliding_window=4, head_dim=8),
    "glm4_moe": dict(
        n_routed_experts=8, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1, head_dim=8
    ),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_oss": dict(
        num_local_experts=8, head_dim=8, layer_types=["sliding_attention", "full_attention"], sliding_window=4
    ),
    "granitemoe": dict(num_local_experts=8),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "llama": {},
    "llama4_text": dict(num_local_experts=8, head_dim=8, intermediate_size_mlp=48, moe_layers=[0, 1]),
    "minimax_m2": dict(num_local_experts=8, head_dim=8, rotary_dim=8),
    "mixtral": dict(num_local_experts=8),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32),
    "qwen3_moe": dict(head_dim=8),
}


def build(model_type: str):
    transformers = models.transformers
    try:
        known = transformers.AutoConfig.for_model(model_type)
    except ValueError:
        pytest.skip(f"transformers {transformers.__version__} has no model type {model_type}")
    config = type(known)(**(models.COMMON | models.MOE | MODELS[model_type]))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=0.0 if parameter.dim() > 1 else 1.0, std=0.3)
    ids = torch.randint(3, models.VOCAB, (2, 9))
    return model.to(DEVICE), {"input_ids": ids.to(DEVICE), "use_cache": False}


@pytest.mark.parametrize("model_type", MODELS)
def test_nothing_changes(model_type, caplog):
    model, inputs = build(model_type)
    fused = fusionpass.fuse(copy.deepcopy(model))
    with torch.no_grad(), caplog.at_level(logging.WARNING), fusionpass.collect() as report:
        # Dynamo's own graph rounds otherwise than eager does in places (rotary tables on CUDA): its bits are the truth.
        expected = torch.compile(model, backend="eager")(**inputs).logits
        got = fused(**inputs).logits
        again = fused(**inputs).logits
    assert report.graphs
    assert report.rewrites == []
    assert report.misses == []
    assert expected.isfinite().all()
    assert torch.equal(got, expected)
    assert torch.equal(again, expected)
    said = [record for record in caplog.records if record.name.split(".")[0] == "fusionpass"]
    assert [(record.name, record.levelname) for record in said] == [("fusionpass", "WARNING")]
    assert said[0].getMessage().startswith("0 rewritten in ")
