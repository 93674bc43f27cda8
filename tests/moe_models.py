"""Every MoE model of transformers, tiny: which sparse layers are rewritten, with which stages, and how exact they are.

    python tests/moe_models.py                       all of them, as a table (about 10 minutes)
    python tests/moe_models.py mixtral deepseek_v3   these
    python tests/moe_models.py --write               all, into docs/models.md

A model type counts as MoE if its modeling file holds `use_experts_implementation`. Its config is the class's own, with every
size made small.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import re
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from models_other import randomize
from programs import DEVICE, SCATTER, relative_error
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "ffn_hidden_size": 48,
    "dense_intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "qk_head_dim": 16,
    "max_position_embeddings": 64,
    "sliding_window": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 1,
    "mamba_n_groups": 1,
    "mamba_dt_rank": 4,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "o_lora_rank": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 128,
    "shared_experts_intermediate_size": 24,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "unpadded_vocab_size": 100,
    "rel_extent": 16,
    "sliding_window_size": 4,
    "rotary_dim": 8,
    "block_size": 4,
    "moe_hidden_size": 32,
    "router_hidden_size": 16,
    "num_attention_heads_per_layer": [4, 4],
    "index_block_size": 4,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "mlp_only_layers": [0],
    "enable_moe_block": True,
    "hc_lowrank": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOST = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1, "moe_layer_start_index": 1}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# Beside these, what a type needs to be built.
SIZES = {
    "bailing_hybrid": dict(num_expert_group=2, topk_group=1),
    "deepseek_v2": dict(num_experts_per_tok=2, n_shared_experts=1),
    "dots1": dict(n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, layer_types=["full_attention"] * 2),
    "deepseek_ocr2": dict(mlp_layer_types=["dense", "sparse"], num_experts_per_tok=2, n_group=1, topk_group=1),
    "ernie4_5_vl_moe": dict(moe_intermediate_size=[16, 16], rope_parameters=ROPE | {"mrope_section": [1, 1, 2]}),
    "glm4v_moe": dict(head_dim=16, rope_parameters=ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}),
    "mistral4": dict(head_dim=16),
    "gemma4": dict(num_experts=8, top_k_experts=2, moe_intermediate_size=16),
    "diffusion_gemma": dict(num_experts=8, top_k_experts=2, moe_intermediate_size=16),
    "glm5_next": dict(index_kpool=4, qk_rope_head_dim=0, head_dim=0, qk_head_dim=8),
    "hunyuan_v1_moe": dict(num_experts=8, moe_topk=2, head_dim=8),
    "hy_v4_vl": dict(rope_parameters=ROPE | {"mrope_section": [1, 1, 2]}),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=1, expert_layer_offset=0),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "mistral_large4": dict(kv_source_layers=[0, 1]),
    "qwen4_exp": dict(
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=4, indexer_compress_ratio=2, hc_count=2,
        ple_layer_ids=[1], ple_embed_dim=16, ngram_size=3, heads_per_ngram=2, ngram_vocab_size_base=50,
        make_ngram_vocab_size_divisible_by=8, split_ngram_parts=1, eos_token_id=2,
    ),
    "zaya": dict(num_experts_per_tok=1),
}  # fmt: skip
IN_FLOAT32 = 1e-5  # the largest difference to float64 that eager itself had in any model is 3e-6
EXPERTS = ("grouped_mm", "batched_mm")
ROOT = Path(__file__).resolve().parents[1]
PAGE, README = ROOT / "docs" / "models.md", ROOT / "README.md"
BEGIN, END = "<!-- models: python tests/moe_models.py --write -->", "<!-- end of models -->"
LAYERS = 2  # the first and the last


def model_types() -> list[str]:
    """The model types whose modeling file has the experts interface."""
    folder = Path(importlib.util.find_spec("transformers").origin).parent / "models"
    files = sorted(folder.glob("*/modeling_*.py"))
    return sorted({file.parent.name for file in files if "use_experts_implementation" in file.read_text()})


def config_of(model_type: str):
    names = [name for name in (f"{model_type}_text", model_type) if name in CONFIG_MAPPING_NAMES]
    config = transformers.AutoConfig.for_model(names[0])
    return config.get_text_config()


def shrunk(config, sizes: dict):
    """A config of the same class with small sizes."""
    known = config.to_dict()
    layers = known.get("num_hidden_layers", 0)
    values = {}
    for name, value in known.items():
        if name in SMALL and value is not None:
            values[name] = SMALL[name]
        elif name in MOST and value is not None:
            values[name] = min(value, MOST[name])
        elif name == "per_layer_config":  # other sizes for some of the layers that are cut away
            continue
        elif isinstance(value, list) and len(value) == layers:
            values[name] = [value[0], value[-1]]  # the last layers are sparse in every model
        elif name not in ("model_type", "transformers_version", "architectures", "dtype", "torch_dtype"):
            values[name] = value
    values["num_hidden_layers"] = LAYERS
    if values.get("kv_lora_rank") is not None:  # latent attention gives every head its own key
        values["num_key_value_heads"] = SMALL["num_attention_heads"]
    return type(config)(**(values | sizes))


def model_class(model_type: str, config):
    """The causal language model of a config, or the model without a head."""
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    found = [
        each
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, transformers.PreTrainedModel)
    ]
    return next(
        each
        for each in found
        if each.config_class is type(config) and each.__name__.endswith("Model") and "PreTrained" not in each.__name__
    )


def tiny(model_type: str, sizes: dict, experts: str):
    config = shrunk(config_of(model_type), sizes)
    torch.manual_seed(0)
    model = model_class(model_type, config)._from_config(config, dtype=torch.float32, experts_implementation=experts)
    randomize(model)
    ids = torch.randint(3, 100, (2, 9))
    return model.to(DEVICE).eval(), {"input_ids": ids.to(DEVICE), "use_cache": False}


class Row(NamedTuple):
    """What became of one model, with one implementation of the experts.

    sparse, sites: the sparse layers that ran, and those of which the weighted sum was rewritten.
    joined: the rule and its stages, for each distinct site.
    left: the stages that did not join, of those that stand there or might, each with the reason.
    exact: the error against float64 is no larger than eager's own, but for scatter. Where a model does not run in float64,
        the difference to eager is rounding.
    """

    sparse: int
    sites: int
    joined: list[str]
    left: list[str]
    exact: bool

    @property
    def cells(self) -> tuple[str, ...]:
        exact = "" if self.exact else "NOT EXACT: "
        return f"{self.sites} of {self.sparse}", exact + "; ".join(self.joined), "; ".join(self.left)


def row(model_type: str, experts: str) -> Row:
    """Build the model, run it in eager, in float64 and fused with `verify`, and say what was rewritten."""
    import fusionpass
    from fusionpass.report.render import worth_a_word

    model, inputs = tiny(model_type, SIZES.get(model_type, {}), experts)
    truth, eager = copy.deepcopy(model).double(), copy.deepcopy(model)
    truth.set_experts_implementation("batched_mm")  # grouped_mm has no float64
    ran: list[torch.nn.Module] = []  # the experts of images do not, for a text
    for module in eager.modules():
        if hasattr(module, "has_gate"):  # the experts interface puts it there
            module.register_forward_hook(lambda module, args, output: ran.append(module))
    torch._dynamo.reset()
    with torch.no_grad(), fusionpass.collect() as report:
        plain = eager(**inputs)[0]
        try:
            want = truth(**inputs)[0]
        except RuntimeError as error:  # some models cast to float32 in the middle, and then multiply by a weight
            if "dtype" not in str(error):
                raise
            want = None
        got = fusionpass.fuse(model, verify=True)(**inputs)[0]
    routed = [site for site in report.rewrites if "finalize" in (site.rule, *site.stages)]
    joined = dict.fromkeys(", ".join(f"`{stage}`" for stage in site.stages) for site in routed)
    left = {f"{stop['stage']}: {words_alone(stop['reason'])}": None for site in routed for stop in worth_a_word(site)}
    if want is None:
        exact = relative_error([got], [plain]) <= IN_FLOAT32
    else:
        exact = relative_error([got], [want]) <= SCATTER * relative_error([plain], [want])
    return Row(len(ran), len(routed), list(joined), list(left), exact)


def words_alone(reason: str) -> str:
    """A reason without the numbers of its nodes, which differ from layer to layer."""
    return re.sub(r"(?<=[a-z])_\d+\b", "", reason)


HEAD = """# MoE models of transformers

What `fusionpass` makes of every model type of transformers {version} whose experts have the experts interface. The models
are tiny, built from their config classes with random float32 weights. They run without gradients, and each site is verified.
`python tests/moe_models.py --write` makes this page. A row that does not name the experts holds for `grouped_mm` and
`batched_mm`. Outputs were compared with float64: no error is larger than eager's own, but for scatter.

{whole} of {all} types have every sparse layer rewritten.

| model type | sparse layers | rewritten as | stages that stayed outside, and why |
|---|---|---|---|
"""


def page(found: dict[str, dict[str, Row]]) -> str:
    """docs/models.md."""
    lines = []
    for model_type, rows in found.items():
        cells = {experts: row.cells for experts, row in rows.items()}
        same = len(set(cells.values())) == 1
        for experts, each in list(cells.items())[: 1 if same else None]:
            name = model_type if same else f"{model_type}, `{experts}`"
            lines.append("| " + " | ".join((name, *each)) + " |")
    whole = sum(all(row.sites >= row.sparse for row in rows.values()) for rows in found.values())
    return HEAD.format(version=transformers.__version__, whole=whole, all=len(found)) + "\n".join(lines) + "\n"


def rows_of(text: str) -> dict[str, tuple[str, ...]]:
    """The cells of docs/models.md by the first one."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    return {cells[0]: tuple(cell.strip() for cell in (*cells[1:], ""))[:3] for cells in lines}


def summary(text: str) -> str:
    """The README's table, from docs/models.md: the model types by what their sparse layers become."""
    kinds: dict[str, list[str]] = {}
    for name, (sparse, joined, _) in rows_of(text).items():
        sites, layers = map(int, sparse.split(" of "))
        kinds.setdefault(joined if sites >= layers else "in part", []).append(name.replace("`", ""))
    ordered = sorted(kinds.items(), key=lambda kind: (kind[0] == "in part", -len(kind[1]), kind[0]))
    lines = [f"| {joined} | {len(names)} | {', '.join(names)} |" for joined, names in ordered]
    return "\n".join(["| every sparse layer becomes | types | model types |", "|---|---|---|", *lines])


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; all of them if none is given")
    parser.add_argument("--write", action="store_true", help="write docs/models.md")
    given = parser.parse_args()
    found: dict[str, dict[str, Row]] = {}
    for model_type in given.types or model_types():
        found[model_type] = {}
        for experts in EXPERTS:
            print(model_type, experts, file=sys.stderr, flush=True)
            try:
                found[model_type][experts] = row(model_type, experts)
            except Exception as error:  # a model that does not run is a row too
                text = f"does not run: {type(error).__name__}: {error}".replace("\n", " ").replace("|", "/")
                found[model_type][experts] = Row(0, 0, [], [text[:150]], True)
    text = page(found)
    if given.write:
        PAGE.write_text(text)
        before, _, rest = README.read_text().partition(BEGIN)
        README.write_text(f"{before}{BEGIN}\n{summary(text)}\n{END}{rest.partition(END)[2]}")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
