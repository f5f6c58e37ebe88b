"""Phi-3, Phi-3.5 and Phi-4-mini: Llama's layers with q, k and v in one linear, gate and up in another."""

from __future__ import annotations

from typing import Any

from kurtail_gguf.model.family import Family
from kurtail_gguf.model.file_form import FileForm, FileKeys


def _file_config(keys: FileKeys) -> dict[str, Any]:
    original = keys.size("rope.scaling.original_context_length", keys.size("context_length"))
    return {"original_max_position_embeddings": original}


FAMILY = Family(
    architecture="Phi3ForCausalLM",
    file=FileForm("phi3", config=_file_config),
    window_of="all",
    whole_heads=True,
    rope_factors=True,
    attention_readers=("self_attn.qkv_proj",),
    query="self_attn.qkv_proj",
    key="self_attn.qkv_proj",
    value="self_attn.qkv_proj",
    ffn_readers=("mlp.gate_up_proj",),
    up="mlp.gate_up_proj",
)
