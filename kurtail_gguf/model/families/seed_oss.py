"""Seed-OSS: Qwen2's layers, their FFN's norm under another name in the file."""

from __future__ import annotations

from kurtail_gguf.model.family import Family
from kurtail_gguf.model.file_form import FileForm

FAMILY = Family(
    architecture="SeedOssForCausalLM",
    file=FileForm("seed_oss"),
    biased_by={"attention_bias": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")},
    refused={
        "attention_out_bias": "upstream's graph has no bias at attention's output for Seed-OSS",
        "mlp_bias": "upstream's graph has no biases in the FFN for Seed-OSS",
    },
    file_norms={"post_attention_layernorm": "post_attention_norm"},
)
