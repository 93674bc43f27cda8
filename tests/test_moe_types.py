"""MoE models of transformers without a gate: every sparse layer is rewritten, with every stage that stands there."""

from __future__ import annotations

import copy

import models
import pytest
import torch
from programs import SCATTER, relative_error

import fusionpass

ALONE, SHARED, ADDED = ["finalize"], ["finalize", "shared_add"], ["finalize", "residual", "rms_norm"]
ALL = ["finalize", "shared_add", "residual", "rms_norm"]
MLA = dict(
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    num_key_value_heads=4,
)
SHARES = dict(n_routed_experts=8, n_shared_experts=1, n_group=2, topk_group=1, first_k_dense_replace=1)
WINDOWS = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=4)
# model type -> sizes beside the common ones, stages of each sparse layer in order. The first layer of some is dense.
TYPES = {
    "afmoe": (
        dict(num_dense_layers=1, layer_types=["sliding_attention", "full_attention"], head_dim=8),
        [["finalize", "shared_add", "post_norm", "residual", "rms_norm"]],
    ),
    "cohere2_moe": ({}, [SHARED, SHARED]),  # the residual is added to the attention first
    "deepseek_v3": (MLA | SHARES, [ALL]),
    "dots1": (SHARES, [ALL]),
    "ernie4_5_moe": (dict(moe_num_experts=8, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=1), [ALL]),
    "flex_olmo": ({}, [["finalize", "post_norm", "residual"], ["finalize", "post_norm", "residual", "rms_norm"]]),
    "glm4_moe": (SHARES | dict(n_group=1, head_dim=8), [ALL]),
    "gpt_oss": (dict(num_local_experts=8, head_dim=8) | WINDOWS, [ADDED, ADDED]),
    "granitemoe": (dict(num_local_experts=8, residual_multiplier=0.5), [ADDED, ADDED]),
    "lfm2_moe": (dict(layer_types=["conv", "full_attention"], num_dense_layers=1), [ADDED]),
    "minimax_m2": (dict(num_local_experts=8, head_dim=8, rotary_dim=8), [ADDED, ADDED]),
    "mixtral": (dict(num_local_experts=8), [ADDED, ADDED]),
    "olmoe": ({}, [ADDED, ADDED]),
    "qwen3_moe": (dict(head_dim=8), [ADDED, ADDED]),
}


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("model_type", TYPES)
def test_every_sparse_layer(model_type, experts):
    sizes, stages = TYPES[model_type]
    model, inputs = models.tiny(model_type, sizes, experts=experts)
    truth, eager = copy.deepcopy(model).double(), copy.deepcopy(model)
    truth.set_experts_implementation("batched_mm")  # grouped_mm has no float64
    with torch.no_grad(), fusionpass.collect() as report:
        want, plain = truth(**inputs).logits, eager(**inputs).logits
        got = fusionpass.fuse(model, verify=experts == "grouped_mm")(**inputs).logits
    assert [(site.rule, site.stages) for site in report.rewrites] == [("finalize", each) for each in stages]
    assert report.misses == []
    assert relative_error([got], [want]) <= SCATTER * relative_error([plain], [want])
