"""ERNIE 4.5 (dense): Llama's layers, with pairs of RoPE side by side in the checkpoint already."""

from __future__ import annotations

from kurtail_gguf.model.family import Family

FAMILY = Family(
    architecture="Ernie4_5ForCausalLM",
    interleaved=True,
    refused={"use_bias": "upstream's graph has no biases in the FFN for ERNIE 4.5"},
)
