"""Nemotron and Minitron (dense): LayerNorm with gains of 1 + weight and biases, and a FFN without a gate, through ReLU²,
which lets a diagonal through as its square."""

from __future__ import annotations

from kurtail_gguf.model.family import Family
from kurtail_gguf.model.file_form import FileForm
from kurtail_gguf.model.norms import NormForm

FAMILY = Family(
    architecture="NemotronForCausalLM",
    file=FileForm("nemotron"),
    whole_heads=True,
    norm=NormForm(centred=True, offset=1.0, biased=True, eps="norm_eps"),
    ffn_readers=("mlp.up_proj",),
    gated=False,
    activation="relu2",
    biased_by={
        "attention_bias": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        "mlp_bias": ("mlp.up_proj", "mlp.down_proj"),
    },
    refused={"tie_word_embeddings": "upstream's graph requires an untied head for Nemotron"},
)
