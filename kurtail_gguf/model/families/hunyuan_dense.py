"""Hunyuan (dense, V1): Llama's layers, each head of q and k normed behind RoPE."""

from __future__ import annotations

from kurtail_gguf.model.family import Family
from kurtail_gguf.model.file_form import FileForm

FAMILY = Family(
    architecture="HunYuanDenseV1ForCausalLM",
    file=FileForm("hunyuan-dense"),
    query_norm="self_attn.query_layernorm",
    key_norm="self_attn.key_layernorm",
    norms_behind_rope=True,
    heads_first=True,
    refused={"attention_bias": "upstream's graph has no bias at attention's output for Hunyuan"},
)
