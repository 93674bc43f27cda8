"""Targets of Hugging Face transformers: a model type, a folder or a hub id, built from the config alone."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fusionpass.targets.config import complete, cut_layers, text_part, without_cache
from fusionpass.targets.memory import ensure_countable, ensure_fits, ensure_room
from fusionpass.targets.types import Target, TargetError, ensure_device, first_line

# The first class that knows the config builds the model: a text decoder with its head, then models that also take text.
AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModel",
)
# Text models that embed no ids. Their forward takes the sum of embeddings from a model around them.
TAKES_EMBEDDINGS = ("qwen3_omni_moe_talker_text",)
ALIKE = 0.8  # the share of common letters from which one name may be a typing error for another
ALL_TYPES = "python -c 'from transformers import CONFIG_MAPPING; print(*CONFIG_MAPPING)'"


def from_hugging_face(
    target: str,
    *,
    kind: str,
    layers: int | None,
    tokens: int,
    batch: int,
    experts: str | None,
    dtype: torch.dtype,
    device: str,
    trust_remote_code: bool,
) -> Target:
    """The model of a config, on `device`, with token ids as inputs.

    On meta, the default, no weight is allocated, for any size. `kind` is "type", "folder" or "hub". Only a hub id, or
    trusted code to which a folder refers, uses the network.
    """
    chosen = ensure_device(device)
    ensure_countable(tokens, batch)
    transformers = _transformers(target)
    with _offline(kind == "type" or (kind == "folder" and not trust_remote_code)):
        config = _config(transformers, target, kind, trust_remote_code)
        notes = complete(config)
        if layers is not None:
            parts = _parts(transformers, config.model_type)
            cut_layers(config, layers, target, f", or name one of its parts{parts}" if parts else "")
        without_cache(config)
        ensure_room(config, tokens, batch, dtype, chosen)
        build = _builder(transformers, config, target, trust_remote_code)
        advice = "keep more layers with --layers" if layers is not None else "give a folder with a complete config.json"
        if experts is not None:
            _ensure_known_experts(transformers, experts)
            build = partial(build, experts_implementation=experts)
        if chosen.type != "meta":
            ensure_fits(_built(build, target, dtype, torch.device("meta"), advice), chosen)
        model = _built(build, target, dtype, chosen, advice).eval()
    if experts is not None:
        _ensure_experts(model, experts, target)
    inputs = _inputs(model, tokens, batch, chosen)
    _ensure_takes(model, inputs, target)
    return Target(name=target, model=model, kwargs=inputs, notes=notes, advice=_advice(config, tokens))


def _advice(config: Any, tokens: int) -> str:
    """What to do if the model fails later because there are more tokens than its table of positions holds."""
    most = getattr(text_part(config), "max_position_embeddings", None)
    if not isinstance(most, int) or tokens <= most:
        return ""
    return f"--tokens {tokens} is more than the {most} positions of its config, so make it smaller"


def _transformers(target: str) -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        if error.name == "transformers":
            raise TargetError(
                f'{target!r} is a Hugging Face model and transformers is not installed: pip install "fusionpass[hf]"'
            ) from error
        raise TargetError(
            f"{target!r} needs transformers, which failed to import ({first_line(error)}): "
            'pip install --upgrade "fusionpass[hf]"'
        ) from error


@contextmanager
def _offline(active: bool) -> Iterator[None]:
    """No request to the hub inside the block. Some configs name a backbone, which transformers would look up there."""
    if not active:
        yield
        return
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _config(transformers: Any, target: str, kind: str, trust_remote_code: bool) -> Any:
    if kind == "type":
        _ensure_known(transformers, target, f"{target!r} is no model type of transformers {transformers.__version__}")
        advice = "give a folder with a complete config.json"
        return _attempt(lambda: transformers.AutoConfig.for_model(target), f"the default config of {target!r}", advice)
    remote = False
    if kind == "folder":
        content = _read_config(target)
        remote = "AutoConfig" in (content.get("auto_map") or {})
        if not remote:
            words = f"{target!r} has model_type {content.get('model_type')!r}, unknown to transformers"
            _ensure_known(transformers, content.get("model_type"), f"{words} {transformers.__version__}")
    try:
        return transformers.AutoConfig.from_pretrained(target, trust_remote_code=trust_remote_code)
    except Exception as error:  # the hub client, the JSON reader and the config class each raise other types
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise TargetError(f"{target!r} brings its own model code: add --trust-remote-code to run it") from error
        if kind == "hub":
            raise TargetError(
                f"{target!r} is no folder here, and its config could not be loaded from the Hugging Face hub "
                f"({first_line(error, 160)}): check the name and the network, or give a folder with its config.json"
            ) from error
        raise TargetError(
            f"the config.json of {target!r} was refused by transformers ({type(error).__name__}: {first_line(error)}): "
            "correct it there"
        ) from error


def _read_config(folder: str) -> dict[str, Any]:
    path = Path(folder).expanduser() / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TargetError(f"the folder {folder!r} has no config.json: give the folder that holds it") from error
    except (OSError, ValueError, RecursionError) as error:
        empty = path.is_file() and path.stat().st_size == 0
        why = "it is empty" if empty else (getattr(error, "strerror", None) or first_line(error))
        raise TargetError(f"{str(path)!r} could not be read as JSON ({why}): correct it") from error
    if not isinstance(content, dict) or not (content.get("model_type") or content.get("auto_map")):
        raise TargetError(f'{str(path)!r} names no model_type: add one, such as "model_type": "qwen3_next"')
    return content


def _ensure_known(transformers: Any, model_type: Any, complaint: str) -> None:
    known = list(transformers.CONFIG_MAPPING)
    if model_type in known:
        return
    close = difflib.get_close_matches(str(model_type).replace("-", "_").lower(), known, n=3, cutoff=ALIKE)
    hint = f"did you mean {', '.join(close)}? " if close else ""
    raise TargetError(f"{complaint}: {hint}see all with {ALL_TYPES}")


def _builder(transformers: Any, config: Any, target: str, trust_remote_code: bool) -> Callable[..., Any]:
    """A function that builds the model in a dtype.

    Raises:
        TargetError: no class takes the config, or only the parts of the class have a forward.
    """
    auto_map = getattr(config, "auto_map", None) or {}
    for name in AUTO_CLASSES:
        auto = getattr(transformers, name, None)
        if auto is None:
            continue
        remote = name in auto_map and trust_remote_code
        if remote or type(config) in auto._model_mapping:
            if not remote:
                _ensure_forward(transformers, auto._model_mapping[type(config)], config, target)
            return partial(auto.from_config, config, trust_remote_code=trust_remote_code)
    if auto_map and not trust_remote_code:
        raise TargetError(f"{target!r} brings its own model code: add --trust-remote-code to run it")
    found = _class_for(transformers, config)
    if found is None:
        raise TargetError(
            f"{target!r} has a config and no model that takes text: name another type"
            + _parts(transformers, config.model_type)
        )
    return partial(found._from_config, config)


def _ensure_forward(transformers: Any, model_class: Any, config: Any, target: str) -> None:
    if getattr(model_class, "forward", None) is torch.nn.Module.forward:
        raise TargetError(
            f"{target!r} is {model_class.__name__}, which has no forward of its own: name one of its parts"
            + _parts(transformers, config.model_type)
        )


def _class_for(transformers: Any, config: Any) -> type | None:
    """The model class for `config` if no auto class lists it, as for the talker of Qwen3-Omni."""
    module = type(config).__module__.replace(".configuration_", ".modeling_")
    try:
        modeling = importlib.import_module(module)
    except ImportError:
        return None
    classes = [
        value
        for value in vars(modeling).values()
        if isinstance(value, type)
        and issubclass(value, transformers.PreTrainedModel)
        and getattr(value, "config_class", None) is type(config)
        and value.forward is not torch.nn.Module.forward
    ]
    ranked = sorted(classes, key=lambda value: ("ForCausalLM" not in value.__name__, len(value.__name__)))
    return ranked[0] if ranked else None


def _parts(transformers: Any, model_type: str) -> str:
    parts = [name for name in transformers.CONFIG_MAPPING if name.startswith(f"{model_type}_") and "text" in name]
    return f", {' or '.join(sorted(parts))}" if parts else ""


def _built(build: Callable[..., Any], target: str, dtype: torch.dtype, device: torch.device, advice: str) -> Any:
    with device:
        return _attempt(lambda: build(dtype=dtype), f"the model of {target!r}", advice)


def _attempt(build: Callable[[], Any], what: str, advice: str) -> Any:
    try:
        return build()
    except Exception as error:  # model and config classes may raise anything if sizes do not fit together
        raise TargetError(
            f"{what} could not be built ({type(error).__name__}: {first_line(error)}): "
            f"{advice}; FUSIONPASS_TRACEBACK=1 shows the traceback"
        ) from error


def _ensure_known_experts(transformers: Any, experts: str) -> None:
    moe = importlib.import_module("transformers.integrations.moe")
    known = sorted({"eager", *moe.ALL_EXPERTS_FUNCTIONS.valid_keys()})
    if experts not in known:
        version = transformers.__version__
        raise TargetError(f"--experts {experts!r} is unknown to transformers {version}: allowed are {', '.join(known)}")


def _ensure_experts(model: torch.nn.Module, experts: str, target: str) -> None:
    """Make sure that some part of the model computes its experts by transformers' functions of that name."""
    asked = (getattr(module, "_can_set_experts_implementation", None) for module in model.modules())
    if not any(ask is not None and ask() for ask in asked):
        raise TargetError(
            f"--experts {experts} has no effect on {target!r}, {type(model).__name__}, which has one way to compute its "
            "experts or has none: leave --experts out"
        )


def _inputs(model: Any, tokens: int, batch: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Token ids, or embeddings in their place. The ids are low, because those of image and audio placeholders are high."""
    if getattr(model.config, "model_type", "") in TAKES_EMBEDDINGS:
        size = (batch, tokens, model.config.hidden_size)
        return {"inputs_embeds": torch.zeros(size, dtype=model.dtype, device=device)}
    ids = torch.arange(batch * tokens, dtype=torch.int64, device=device).reshape(batch, tokens) % 97 + 3
    inputs = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


def _ensure_takes(model: Any, inputs: dict[str, torch.Tensor], target: str) -> None:
    parameters = inspect.signature(model.forward).parameters.values()
    names = [each.name for each in parameters]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    open_ones = [p.name for p in parameters if p.default is p.empty and p.kind not in variadic and p.name not in inputs]
    refused = [name for name in inputs if name not in names]
    if open_ones or refused:
        why = f"needs {', '.join(open_ones)}" if open_ones else f"takes no {', '.join(refused)}"
        raise TargetError(
            f"{target!r} is {type(model).__name__}, which {why}, and only token ids are made here: "
            "build it in a file with example_inputs beside it and give FILE.py:NAME"
        )
