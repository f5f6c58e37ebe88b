"""Llama 2, 3, SmolLM2, TinyLlama and others that share ``LlamaForCausalLM``."""

from __future__ import annotations

from kurtail_gguf.model.family import Family
from kurtail_gguf.model.file_form import FileForm

FAMILY = Family(
    architecture="LlamaForCausalLM",
    file=FileForm("llama", told_by=lambda keys: keys.get("expert_count", 0) == 0),
    rope_factors=True,
    rope_pairs=True,
    biased_by={
        "attention_bias": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        "mlp_bias": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    },
)
