"""Mistral 7B and Nemo: Llama's layers without biases, head_dim free of hidden_size (Nemo: 128 of 5120/32)."""

from __future__ import annotations

from kurtail_gguf.model.spec import Family

FAMILY = Family(architecture="MistralForCausalLM", rope_pairs=True)
