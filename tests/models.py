"""Tiny models of transformers, from config, with random weights: the families with the formula, and families without."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from programs import DEVICE

transformers = pytest.importorskip("transformers")

VOCAB = 128
COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MOE = dict(
    moe_intermediate_size=16,
    shared_expert_intermediate_size=24,
    num_experts=8,
    num_experts_per_tok=2,
)
DELTA = dict(
    head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"],
)


def _config(name: str, **values):
    return transformers.AutoConfig.for_model(name, **values)


def qwen2_moe():
    return _config("qwen2_moe", **COMMON, **MOE)


def qwen3_next():
    return _config("qwen3_next", **COMMON, **MOE, **DELTA)


def qwen3_5_moe():
    return _config("qwen3_5_moe_text", **COMMON, **MOE, **DELTA)


def _causal(config, dtype, experts, layers):
    config.num_hidden_layers = layers
    if hasattr(config, "linear_key_head_dim"):
        config.layer_types = config.layer_types[-layers:]
    if experts == "eager":
        config.num_experts = 4  # Dynamo unrolls the loop over them
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation=experts)


def build(
    name: str, *, dtype: torch.dtype = torch.float32, experts: str = "grouped_mm", seed: int = 0, layers: int = 2
):
    """The model in eval mode, and one call's keyword arguments. Of one layer: the one whose attention is no recurrence."""
    torch.manual_seed(seed)
    model = FAMILIES[name](dtype, experts, layers).eval()
    for parameter in model.parameters():  # _from_config leaves the talker's experts uninitialised
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (2, 9), generator=generator)
    return model.to(DEVICE), {"input_ids": ids.to(DEVICE), "use_cache": False}


FAMILIES: dict[str, Callable] = {
    "qwen2_moe": lambda *given: _causal(qwen2_moe(), *given),
    "qwen3_next": lambda *given: _causal(qwen3_next(), *given),
    "qwen3_5_moe": lambda *given: _causal(qwen3_5_moe(), *given),
}


def tiny(model_type: str, sizes: dict):
    """Any causal language model with these sizes beside the common ones, in eval mode, and one call's keyword arguments."""
    try:
        known = transformers.AutoConfig.for_model(model_type)
    except ValueError:
        pytest.skip(f"transformers {transformers.__version__} has no model type {model_type}")
    config = type(known)(**(COMMON | MOE | sizes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=0.0 if parameter.dim() > 1 else 1.0, std=0.3)
    ids = torch.randint(3, VOCAB, (2, 9))
    return model.to(DEVICE), {"input_ids": ids.to(DEVICE), "use_cache": False}
