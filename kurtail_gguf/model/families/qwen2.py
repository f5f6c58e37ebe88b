"""Qwen2 and Qwen2.5: Llama's layers with biases on q, k and v. V's bias rotates with R2."""

from __future__ import annotations

from kurtail_gguf.model.family import Family
from kurtail_gguf.model.file_form import FileForm

FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    file=FileForm("qwen2"),
    window_of="layers",
    whole_heads=True,
    always_biased=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
)
