"""Olmo 2: no norms before attention and FFN but behind them, and q and k normed over all heads together. What attention and FFN
read is the residual stream as it is, so no diagonal can be folded there."""

from __future__ import annotations

from kurtail_gguf.model.family import Family
from kurtail_gguf.model.file_form import FileForm

FAMILY = Family(
    architecture="Olmo2ForCausalLM",
    file=FileForm("olmo2", told_by=lambda keys: not keys.get("attention.sliding_window", 0)),
    whole_heads=True,
    attention_norm="",
    attention_post_norm="post_attention_layernorm",
    ffn_norm="",
    ffn_post_norm="post_feedforward_layernorm",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    wide_norms=True,
    refused={
        "attention_bias": "upstream's graph has no biases for Olmo 2",
        "tie_word_embeddings": "upstream's graph requires an untied head for Olmo 2",
    },
)
