"""Adjust a transformers config before its model is built: fewer layers, no cache, sizes that the class leaves open."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fusionpass.targets.types import TargetError

LAYER_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "num_encoder_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
)

# Some config classes cannot build their own default model without these sizes. Any consistent values will do. They are
# the sizes of the attention that picks tokens, and the width of the shared expert.
COMPLETIONS = {
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 256,
        "indexer_compress_ratio": 16,
    },
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 768},
}


def parts(config: Any) -> Iterator[Any]:
    """`config` and the configs nested in it."""
    yield config
    for name in getattr(config, "sub_configs", None) or {}:
        nested = getattr(config, name, None)
        if nested is not None:
            yield from parts(nested)


def text_part(config: Any) -> Any:
    """The config of the text decoder: `config` itself, unless a config for it is nested inside."""
    nested = getattr(config, "text_config", None)
    return nested if nested is not None else config


def complete(config: Any) -> tuple[str, ...]:
    """Fill in sizes that the config class leaves open. Returns a sentence for each config that needed this."""
    notes = []
    for part in parts(config):
        missing = {
            name: value
            for name, value in COMPLETIONS.get(getattr(part, "model_type", ""), {}).items()
            if getattr(part, name, None) is None
        }
        for name, value in missing.items():
            setattr(part, name, value)
        if missing:
            values = ", ".join(f"{name}={value}" for name, value in missing.items())
            notes.append(f"the config of {part.model_type} leaves sizes open; built with {values}")
    return tuple(notes)


def cut_layers(config: Any, layers: int, target: str, hint: str = "") -> None:
    """Keep the first `layers` layers, and the first `layers` entries of every per-layer list.

    So the layers that remain keep their layer types. A per-layer list is recognised by its length. In this way
    `layer_types`, `no_rope_layers`, `mlp_layer_types` and future lists are all cut.
    """
    part = text_part(config)
    counts = {name: getattr(part, name) for name in LAYER_COUNTS if isinstance(getattr(part, name, None), int)}
    if not counts:
        raise TargetError(
            f"--layers {layers} was given and the config of {target!r} has no layer count: leave it out{hint}"
        )
    most = max(counts.values())
    if layers > most:
        raise TargetError(f"--layers {layers} was given and {target!r} has {most}: --layers only cuts")
    for name, value in list(vars(part).items()):
        if isinstance(value, (list, tuple)) and len(value) == most:
            setattr(part, name, value[:layers])
    if isinstance(getattr(part, "num_kv_shared_layers", None), int):  # the last layers, which read the keys of others
        part.num_kv_shared_layers = max(0, layers - (most - part.num_kv_shared_layers))
    for name, count in counts.items():
        try:
            setattr(part, name, min(count, layers))
        except NotImplementedError:  # a read-only sum of encoder and decoder layers; these two are cut by themselves
            continue


def without_cache(config: Any) -> None:
    """Make a call one forward over a prompt, without a key-value cache in the graph."""
    for part in parts(config):
        if hasattr(part, "use_cache"):
            part.use_cache = False
