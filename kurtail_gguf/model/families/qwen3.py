"""Qwen3: Qwen2's layers without biases, each head of q and k normed before RoPE. R3 comes after both, and so stays exact."""

from __future__ import annotations

from kurtail_gguf.model.family import Family
from kurtail_gguf.model.file_form import FileForm

FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    file=FileForm("qwen3"),
    window_of="layers",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    refused={"attention_bias": "upstream's graph has no bias at attention's output for Qwen3"},
)
