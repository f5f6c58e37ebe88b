"""dots.llm1: Qwen3's attention; the first layers with a FFN, the others with GLM-4.5's experts."""

from __future__ import annotations

from dataclasses import replace

from kurtail_gguf.model.families.glm4_moe import FAMILY as GLM4_MOE
from kurtail_gguf.model.family import Family
from kurtail_gguf.model.file_form import FileForm

FAMILY = Family(
    architecture="Dots1ForCausalLM",
    file=FileForm(
        "dots1", keys={"leading_dense_block_count": "first_k_dense_replace", "expert_shared_count": "n_shared_experts"}
    ),
    window_of="layers",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    refused={
        "attention_bias": "upstream's graph has no biases for dots.llm1",
        "tie_word_embeddings": "upstream's graph wants a head of its own for dots.llm1",
    },
    experts=replace(
        GLM4_MOE.experts,
        required=dict(GLM4_MOE.experts.required) | {
            "scoring_func": (("sigmoid",), "upstream's converter knows noaux_tc, which is this, by the name sigmoid: set it in config.json")
        },
    ),
)  # fmt: skip
