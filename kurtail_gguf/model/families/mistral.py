"""Mistral 7B and Nemo, and the text part of Mistral Small 3.1 and later: Llama's layers without biases, head_dim free of
hidden_size (Nemo: 128 of 5120/32)."""

from __future__ import annotations

from kurtail_gguf.model.family import Family
from kurtail_gguf.model.file_form import FileForm

FAMILY = Family(
    architecture="MistralForCausalLM",
    file=FileForm("mistral3", told_by=lambda keys: "attention.temperature_scale" not in keys),
    window_of="all",
    rope_factors=True,
    wrappers={"Mistral3ForConditionalGeneration": "mistral"},
    rope_pairs=True,
)
