"""The talker and qwen4_exp, and the smallest real modules of transformers that hold, or nearly hold, the formula.

Every builder takes a dtype and gives the module in eval mode with one call's arguments, all on `DEVICE` and initialised
in full: some of these classes leave `torch.empty` to a checkpoint.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from programs import DEVICE
from torch import nn

Built = tuple[nn.Module, tuple[Any, ...]]


def classes(model_type: str, *names: str, file: str = "modeling") -> list[Any]:
    """Classes of one model; the test is skipped where this transformers has no such model, or not that class."""
    path = f"transformers.models.{model_type}.{file}_{model_type}"
    try:
        module = importlib.import_module(path)
        return [getattr(module, name) for name in names]
    except (ImportError, AttributeError) as error:
        pytest.skip(f"{models.transformers.__version__} of transformers has no {', '.join(names)} in {path}: {error}")


def randomize(module: nn.Module) -> None:
    """Weights around 0; vectors around 1, which keeps norms and scales apart from zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            nn.init.normal_(parameter, mean=0.0 if parameter.dim() > 1 else 1.0, std=0.3)


def ready(module: nn.Module, *args: Any, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> Built:
    randomize(module)
    args = tuple(a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
    args = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)
    return module.to(device, dtype).eval(), args


# Whole models: experts implementation and dtype -> the model and one call's keyword arguments.


def talker(experts: str, dtype: torch.dtype = torch.float32):
    (model_class,) = classes("qwen3_omni_moe", "Qwen3OmniMoeTalkerModel")
    (config_class,) = classes("qwen3_omni_moe", "Qwen3OmniMoeTalkerTextConfig", file="configuration")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = config_class(**models.COMMON, **models.MOE, rope_parameters=rope)
    torch.manual_seed(0)
    model = model_class._from_config(config, dtype=dtype, experts_implementation=experts)
    randomize(model)
    embeds = torch.randn(2, 9, config.hidden_size).to(DEVICE, dtype)
    return model.to(DEVICE).eval(), {"inputs_embeds": embeds, "use_cache": False}


QSA = dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=4, indexer_compress_ratio=2)
PLE = dict(
    ple_layer_ids=[1],
    ple_embed_dim=16,
    ngram_size=3,
    heads_per_ngram=2,
    ngram_vocab_size_base=50,
    make_ngram_vocab_size_divisible_by=8,
    split_ngram_parts=1,
)


def _qwen4_exp_config(**more: Any):
    (config_class,) = classes("qwen4_exp", "Qwen4ExpTextConfig", file="configuration")
    layer_types = ["linear_attention", "full_attention"]
    known = models.COMMON | models.MOE | models.DELTA | {"layer_types": layer_types, "hc_count": 2, "hc_lowrank": 8}
    return config_class(**known, **more)


def qwen4_exp(experts: str, dtype: torch.dtype = torch.float32):
    (model_class,) = classes("qwen4_exp", "Qwen4ExpForCausalLM")
    torch.manual_seed(0)
    model = model_class._from_config(_qwen4_exp_config(**QSA), dtype=dtype, experts_implementation=experts)
    randomize(model)
    ids = torch.randint(3, models.VOCAB, (2, 9))
    return model.to(DEVICE).eval(), {"input_ids": ids.to(DEVICE), "use_cache": False}


FAMILIES: dict[str, Callable] = {"qwen3_omni_moe": talker, "qwen4_exp": qwen4_exp}


# Modules: dtype -> the module and one call's arguments.


def _esmfold2_config():
    (config_class,) = classes("esmfold2", "EsmFold2Config", file="configuration")
    diffusion = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32, atom_encoder=dict(output_dim=16))
    config = config_class(
        pairwise_hidden_size=8,
        pair_transition_intermediate_size=16,
        chunk_size=None,
        structure_head=dict(diffusion_module=diffusion),
    )
    config._attn_implementation = "eager"
    return config


def _float_norms(built: Built) -> Built:
    """Its LayerNorms compute in float32 and pin their weights to it, as from_pretrained does."""
    for module in built[0].modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    return built


def esmfold2_diffusion(dtype: torch.dtype = torch.float32) -> Built:
    (layer,) = classes("esmfold2", "EsmFold2DiffusionLayer")
    hidden, single, bias = torch.randn(2, 5, 16), torch.randn(2, 5, 16), torch.randn(2, 2, 5, 5)
    return _float_norms(ready(layer(_esmfold2_config()), hidden, single, bias, dtype=dtype))


def esmfold2_pair(dtype: torch.dtype = torch.float32) -> Built:
    (layer,) = classes("esmfold2", "EsmFold2PairUpdateLayer")
    return _float_norms(ready(layer(_esmfold2_config()), torch.randn(2, 5, 5, 8), dtype=dtype))


def rwkv(dtype: torch.dtype = torch.float32) -> Built:
    (block,) = classes("rwkv", "RwkvBlock")
    (config_class,) = classes("rwkv", "RwkvConfig", file="configuration")
    config = config_class(vocab_size=32, hidden_size=16, num_hidden_layers=2, context_length=32)
    return ready(block(config, 0), torch.randn(2, 3, 16), dtype=dtype)


def qwen2_5_omni_se(dtype: torch.dtype = torch.float32) -> Built:
    (block,) = classes("qwen2_5_omni", "SqueezeExcitationRes2NetBlock")
    return ready(block(16, 16, res2net_scale=2, se_channels=4, kernel_size=3), torch.randn(2, 16, 11), dtype=dtype)


def univnet(dtype: torch.dtype = torch.float32) -> Built:
    (block,) = classes("univnet", "UnivNetLvcResidualBlock")
    (config_class,) = classes("univnet", "UnivNetConfig", file="configuration")
    channels, frames, hop = 8, 4, 8
    kernel, bias = torch.randn(1, channels, 2 * channels, 3, frames), torch.randn(1, 2 * channels, frames)
    module = block(config_class(model_hidden_channels=channels), kernel_size=3, dilation=1)
    return ready(module, torch.randn(1, channels, frames * hop), kernel, bias, hop, dtype=dtype)


def muse_spark(dtype: torch.dtype = torch.float32) -> Built:
    (gate,) = classes("muse_spark", "MuseSparkResidualGate")
    config = SimpleNamespace(hidden_size=16, residual_gate_temperature=0.3)
    return ready(gate(config), torch.randn(2, 5, 16), torch.randn(2, 5, 16), dtype=dtype)


def d_fine(dtype: torch.dtype = torch.float32) -> Built:
    (gate,) = classes("d_fine", "DFineGate")
    return ready(gate(16), torch.randn(2, 5, 16), torch.randn(2, 5, 16), dtype=dtype)


def deimv2(dtype: torch.dtype = torch.float32) -> Built:
    (gate,) = classes("deimv2", "Deimv2Gate")
    return ready(gate(16), torch.randn(2, 5, 16), torch.randn(2, 5, 16), dtype=dtype)


def clap(dtype: torch.dtype = torch.float32) -> Built:
    (block,) = classes("clap", "ClapAudioAFFBlock")
    config = SimpleNamespace(patch_embeds_hidden_size=16, aff_block_r=4)
    return ready(block(config), torch.randn(2, 16, 6, 5), torch.randn(2, 16, 6, 5), dtype=dtype)


def glpn(dtype: torch.dtype = torch.float32) -> Built:
    (fusion,) = classes("glpn", "GLPNSelectiveFeatureFusion")
    return ready(fusion(8), torch.randn(2, 8, 6, 5), torch.randn(2, 8, 6, 5), dtype=dtype)


def qwen4_exp_ple(dtype: torch.dtype = torch.float32, masked: bool = False) -> Built:
    (layer,) = classes("qwen4_exp", "Qwen4ExpTextPLELayer")
    module = layer(_qwen4_exp_config(**PLE), 0, 0)
    mask = torch.ones(2, 9) if masked else None
    return ready(module, torch.randn(2, 9, 64), torch.randint(3, models.VOCAB, (2, 9)), None, mask, dtype=dtype)


def lstm_cell(dtype: torch.dtype = torch.float32) -> Built:
    # On a CPU in every run: CUDA has one fused op for a cell, with no formula left to see.
    args = torch.randn(3, 6), (torch.randn(3, 8, dtype=dtype), torch.randn(3, 8, dtype=dtype))
    return ready(nn.LSTMCell(6, 8), *args, dtype=dtype, device="cpu")


def gru_cell(dtype: torch.dtype = torch.float32) -> Built:
    return ready(nn.GRUCell(6, 8), torch.randn(3, 6), torch.randn(3, 8), dtype=dtype, device="cpu")


def slanet(dtype: torch.dtype = torch.float32) -> Built:
    (cell,) = classes("slanet", "SLANetAttentionGRUCell")
    args = torch.randn(3, 8), torch.randn(3, 5, 6), torch.randn(3, 4)
    return ready(cell(6, 8, 4), *args, dtype=dtype, device="cpu")


# Near misses.


class Function(nn.Module):
    """A function of a modeling file as a module."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def maskformer_loss(dtype: torch.dtype = torch.float32) -> Built:
    (loss,) = classes("maskformer", "sigmoid_focal_loss")
    return ready(Function(loss), torch.randn(3, 20), torch.rand(3, 20).round(), 3, dtype=dtype)


def hy_v4(dtype: torch.dtype = torch.float32) -> Built:
    (connection,) = classes("hy_v4", "HYV4HyperConnection")
    config = SimpleNamespace(hidden_size=8, hc_mult=2, hc_eps=1e-4, hc_magnitude=2.0, rms_norm_eps=1e-6)
    return ready(connection(config), torch.randn(2, 5, 2, 8), dtype=dtype)


def deepseek_v4(dtype: torch.dtype = torch.float32) -> Built:
    return _hyper_connected("deepseek_v4", "DeepseekV4HyperConnection", dtype)


def glm5_next(dtype: torch.dtype = torch.float32) -> Built:
    return _hyper_connected("glm5_next", "Glm5NextTextHyperConnection", dtype)


class HyperConnected(nn.Module):
    """The residual of these models' decoder layers, in their own words, around nothing."""

    def __init__(self, connection: nn.Module):
        super().__init__()
        self.connection = connection

    def forward(self, hidden_states):
        dtype = hidden_states.dtype
        post, comb, output = self.connection(hidden_states)
        return post.to(dtype).unsqueeze(-1) * output.unsqueeze(-2) + torch.matmul(
            comb.to(dtype).transpose(-1, -2), hidden_states
        )


def _hyper_connected(model_type: str, name: str, dtype: torch.dtype) -> Built:
    (connection,) = classes(model_type, name)
    config = SimpleNamespace(hidden_size=8, hc_mult=2, hc_eps=1e-4, hc_sinkhorn_iters=2, rms_norm_eps=1e-6)
    return ready(HyperConnected(connection(config)), torch.randn(2, 5, 2, 8), dtype=dtype)


def qwen4_exp_layer(dtype: torch.dtype = torch.float32) -> Built:
    (layer,) = classes("qwen4_exp", "Qwen4ExpTextDecoderLayer")
    config = _qwen4_exp_config()
    config._experts_implementation = "batched_mm"
    return ready(layer(config, 0), torch.randn(2, 9, 64), None, dtype=dtype)


def esmfold(dtype: torch.dtype = torch.float32) -> Built:
    try:
        from transformers.models.esm.modeling_esmfold import EsmFoldTriangularSelfAttentionBlock as Block
    except ImportError as error:
        pytest.skip(f"{models.transformers.__version__} of transformers has no such block: {error}")
    config = SimpleNamespace(
        sequence_state_dim=16, pairwise_state_dim=8, sequence_head_width=8, pairwise_head_width=4, dropout=0.1
    )
    return ready(Block(config), torch.randn(2, 5, 16), torch.randn(2, 5, 5, 8), dtype=dtype)


def patchtst(dtype: torch.dtype = torch.float32) -> Built:
    (head,) = classes("patchtst", "PatchTSTRegressionHead")
    (config_class,) = classes("patchtst", "PatchTSTConfig", file="configuration")
    config = config_class(num_input_channels=2, d_model=8, num_targets=3, output_range=[0, 5], pooling_type="mean")
    return ready(head(config), torch.randn(4, 2, 5, 8), dtype=dtype)


def patchtsmixer(dtype: torch.dtype = torch.float32) -> Built:
    (head,) = classes("patchtsmixer", "PatchTSMixerLinearHead")
    (config_class,) = classes("patchtsmixer", "PatchTSMixerConfig", file="configuration")
    config = config_class(
        num_input_channels=2, d_model=8, num_targets=3, output_range=[0, 5], head_aggregation="avg_pool"
    )
    return ready(head(config), torch.randn(4, 2, 5, 8), dtype=dtype)


def wavlm(dtype: torch.dtype = torch.float32) -> Built:
    (attention,) = classes("wavlm", "WavLMAttention")
    return ready(attention(16, 2, num_buckets=8, max_distance=16), torch.randn(2, 5, 16), dtype=dtype)


def swinv2(dtype: torch.dtype = torch.float32) -> Built:
    (attention,) = classes("swinv2", "Swinv2SelfAttention")
    config = SimpleNamespace(qkv_bias=True, attention_probs_dropout_prob=0.0)
    return ready(attention(config, 16, 2, 4), torch.randn(2, 16, 16), dtype=dtype)


def qwen3_next_recurrent(dtype: torch.dtype = torch.float32) -> Built:
    (rule,) = classes("qwen3_next", "torch_recurrent_gated_delta_rule")

    def step(query, key, value, decay, logit):
        return rule(query, key, value, -decay.exp(), logit.sigmoid(), output_final_state=True)[0]

    heads = [torch.randn(2, 3, 2, 4) for _ in range(3)]
    return ready(Function(step), *heads, torch.randn(2, 3, 2), torch.randn(2, 3, 2), dtype=dtype)


def pp_ocrv5(dtype: torch.dtype = torch.float32) -> Built:
    (head,) = classes("pp_ocrv5_server_det", "PPOCRV5ServerDetHead")
    config = SimpleNamespace(
        neck_out_channels=16, kernel_list=[3, 2, 2], scale_factor=2, interpolate_mode="nearest", hidden_act="relu"
    )
    return ready(head(config), torch.randn(1, 16, 4, 4), dtype=dtype)


def efficientnet(dtype: torch.dtype = torch.float32) -> Built:
    (block,) = classes("efficientnet", "EfficientNetBlock")
    (config_class,) = classes("efficientnet", "EfficientNetConfig", file="configuration")
    module = block(
        config_class(),
        in_dim=8,
        out_dim=8,
        stride=1,
        expand_ratio=2,
        kernel_size=3,
        drop_rate=0.1,
        id_skip=False,
        adjust_padding=False,
    )
    return ready(module, torch.randn(2, 8, 6, 6), dtype=dtype)


def emu3(dtype: torch.dtype = torch.float32) -> Built:
    (block,) = classes("emu3", "Emu3VQVAETemporalResnetBlock")
    return ready(block(4, 4), torch.randn(1, 4, 2, 3, 3), dtype=dtype)


def mllama(dtype: torch.dtype = torch.float32) -> Built:
    (layer,) = classes("mllama", "MllamaVisionEncoderLayer")
    (config_class,) = classes("mllama", "MllamaVisionConfig", file="configuration")
    config = config_class(hidden_size=16, attention_heads=2, intermediate_size=24)
    config._attn_implementation = "eager"
    return ready(layer(config, is_gated=True), torch.randn(2, 5, 16), dtype=dtype)
