"""Granite 3: Llama's layers with four multipliers: of embeddings, residual branches, attention scores and logits.

A number commutes with every rotation, so nothing is folded for them; what runs layers here applies them, as the
runtime does from its own keys.
"""

from __future__ import annotations

from dataclasses import replace

from kurtail_gguf.model.families.llama import FAMILY as LLAMA
from kurtail_gguf.model.file_form import FileForm

FAMILY = replace(
    LLAMA,
    architecture="GraniteForCausalLM",
    file=FileForm("granite", keys={"attention.scale": "attention_multiplier"}),
    whole_heads=True,
    embedding_scale="embedding_multiplier",
    residual_scale="residual_multiplier",
    logit_divisor="logits_scaling",
)
