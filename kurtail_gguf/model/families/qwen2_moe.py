"""Qwen2-MoE (Qwen1.5-MoE too): Qwen2's attention; every layer a mixture of experts, beside them one that all tokens go through
and that is multiplied by a gate of its own. Shares are those of a softmax over all experts, as they come."""

from __future__ import annotations

from dataclasses import replace

from kurtail_gguf.model.families.qwen2 import FAMILY as QWEN2
from kurtail_gguf.model.families.qwen3_moe import FAMILY as QWEN3_MOE
from kurtail_gguf.model.family import ExpertNames
from kurtail_gguf.model.file_form import FileForm

#: What ``normalized=False`` needs where config.json can say otherwise.
SHARES_AS_THEY_COME = {
    "norm_topk_prob": ((False,), "the runtime's chosen experts have the shares that the softmax over all gives them"),
}

FAMILY = replace(
    QWEN2,
    architecture="Qwen2MoeForCausalLM",
    file=FileForm("qwen2moe", keys={"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}),
    always_biased=(),
    biased_by={"qkv_bias": QWEN2.always_biased},
    refused={"tie_word_embeddings": "upstream's graph wants a head of its own for Qwen2-MoE"},
    experts=ExpertNames(
        count="num_experts",
        width="moe_intermediate_size",
        normalized=False,
        shared=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"),
        shared_width=lambda config: config["shared_expert_intermediate_size"],
        shared_gate="mlp.shared_expert_gate",
        required=dict(QWEN3_MOE.experts.required) | SHARES_AS_THEY_COME,
    ),
)
