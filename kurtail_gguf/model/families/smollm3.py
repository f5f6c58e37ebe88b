"""SmolLM3: Llama's layers, every fourth without RoPE; q and k may be permuted and rotated there as anywhere."""

from __future__ import annotations

from kurtail_gguf.model.family import Family

FAMILY = Family(
    architecture="SmolLM3ForCausalLM",
    rope_pairs=True,
    turned=lambda config, layer: bool(config["no_rope_layers"][layer]),  # 0 where there is none
    refused={
        "attention_bias": "upstream's graph has no biases for SmolLM3",
        "mlp_bias": "upstream's graph has no biases for SmolLM3",
        "use_sliding_window": "upstream's graph attends to everything",
    },
)
