"""ERNIE 4.5 (dense): Llama's layers, with pairs of RoPE side by side in the checkpoint already."""

from __future__ import annotations

from kurtail_gguf.model.family import Family
from kurtail_gguf.model.file_form import FileForm

FAMILY = Family(
    architecture="Ernie4_5ForCausalLM",
    file=FileForm("ernie4_5"),
    interleaved=True,
    refused={"use_bias": "upstream's graph has no biases in the FFN for ERNIE 4.5"},
)
