"""Dense models: nothing is rewritten, every bit stays, and one warning says so. Those with experts: `test_moe_types.py`."""

from __future__ import annotations

import copy
import logging

import models
import pytest
import torch

import fusionpass

# Beside the common sizes.
MODELS = {
    "bloom": {},
    "gemma3_text": dict(layer_types=["sliding_attention", "full_attention"], sliding_window=4, head_dim=8),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "llama": {},
    "llama4_text": dict(
        num_local_experts=8, head_dim=8, intermediate_size_mlp=48, moe_layers=[0, 1]
    ),  # no weighted sum
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32),
}


@pytest.mark.parametrize("model_type", MODELS)
def test_nothing_changes(model_type, caplog):
    model, inputs = models.tiny(model_type, MODELS[model_type])
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
