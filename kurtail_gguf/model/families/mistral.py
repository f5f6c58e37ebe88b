"""Mistral 7B and Nemo, and the text part of Mistral Small 3.1 and later: Llama's layers without biases, head_dim free of
hidden_size (Nemo: 128 of 5120/32)."""

from __future__ import annotations

from kurtail_gguf.model.family import Family

FAMILY = Family(
    architecture="MistralForCausalLM",
    window_of="all",
    rope_factors=True,
    wrappers={"Mistral3ForConditionalGeneration": "mistral"},
    rope_pairs=True,
)
