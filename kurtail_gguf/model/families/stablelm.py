"""StableLM: LayerNorm with biases and RoPE on a quarter of a head; in some models attention and FFN read the same."""

from __future__ import annotations

from kurtail_gguf.model.family import Family
from kurtail_gguf.model.file_form import FileForm
from kurtail_gguf.model.norms import NormForm

FAMILY = Family(
    architecture="StableLmForCausalLM",
    file=FileForm("stablelm", config=lambda keys: {"use_parallel_residual": keys.flag("use_parallel_residual", True)}),
    whole_heads=True,
    norm=NormForm(centred=True, biased=True, eps="layer_norm_eps"),
    biased_by={"use_qkv_bias": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")},
    refused={
        "qk_layernorm": "norms of single heads of q and k are not implemented",
        "tie_word_embeddings": "upstream's graph requires an untied head for StableLM",
    },
    variants={"use_parallel_residual": {"parallel": True, "ffn_norm": ""}},
)
