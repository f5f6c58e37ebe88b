"""Granite 3: Llama's layers with four multipliers: of embeddings, residual branches, attention scores and logits.

A number commutes with every rotation, so nothing is folded for them; what runs layers here applies them, as the
runtime does from its own keys.
"""

from __future__ import annotations

from kurtail_gguf.arch.spec import Family

FAMILY = Family(
    architecture="GraniteForCausalLM",
    rope_pairs=True,
    biased_by={
        "attention_bias": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        "mlp_bias": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    },
    embedding_scale="embedding_multiplier",
    residual_scale="residual_multiplier",
    logit_divisor="logits_scaling",
)
