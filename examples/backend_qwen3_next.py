"""torch.compile with the backend, on a real (tiny, randomly initialised) Qwen3-Next.

pip install "fusionpass[hf]"
python examples/backend_qwen3_next.py
"""

import torch
from transformers import AutoModelForCausalLM, Qwen3NextConfig

import fusionpass

CONFIG = Qwen3NextConfig(
    vocab_size=256,
    hidden_size=64,
    num_hidden_layers=4,
    layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=64,
)

if __name__ == "__main__":
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG).eval()
    tokens = torch.randint(0, CONFIG.vocab_size, (1, 16))
    # On a GPU leave `options` out: the inner compiler is then Inductor.
    compiled = torch.compile(model, backend="fusionpass", options={"inner": "eager"})
    with torch.no_grad(), fusionpass.collect() as report:
        fused = compiled(tokens, use_cache=False).logits
        unfused = model(tokens, use_cache=False).logits
    print(report)
    print(f"largest difference of the logits: {(fused - unfused).abs().max():.1e}")
