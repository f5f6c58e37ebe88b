"""OLMoE: Llama's layers with norms of all heads of q and k together, each layer a mixture of experts; shares are those of a softmax
over all experts, as they come."""

from __future__ import annotations

from kurtail_gguf.model.families.qwen2_moe import SHARES_AS_THEY_COME
from kurtail_gguf.model.family import ExpertNames, Family
from kurtail_gguf.model.file_form import FileForm

FAMILY = Family(
    architecture="OlmoeForCausalLM",
    file=FileForm("olmoe"),
    whole_heads=True,
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    wide_norms=True,
    refused={
        "attention_bias": "upstream's graph has no biases for OLMoE",
        "sliding_window": "upstream's graph attends to everything for OLMoE",
        "clip_qkv": "upstream's graph does not clip queries, keys and values",
        "tie_word_embeddings": "upstream's graph wants a head of its own for OLMoE",
    },
    experts=ExpertNames(
        count="num_experts",
        width="intermediate_size",
        normalized=False,
        required=SHARES_AS_THEY_COME,
    ),
)
