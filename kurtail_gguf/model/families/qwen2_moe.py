"""Qwen2-MoE (Qwen1.5-MoE too): Qwen2's attention; every layer a mixture of experts, beside them one that all tokens go through
and that is multiplied by a gate of its own. Shares are those of a softmax over all experts, as they come."""

from __future__ import annotations

from dataclasses import replace

from kurtail_gguf.model.families.qwen2 import FAMILY as QWEN2
from kurtail_gguf.model.family import ExpertNames

FAMILY = replace(
    QWEN2,
    architecture="Qwen2MoeForCausalLM",
    always_biased=(),
    biased_by={"qkv_bias": QWEN2.always_biased},
    refused={"tie_word_embeddings": "upstream's graph wants a head of its own for Qwen2-MoE"},
    experts=ExpertNames(
        router="mlp.gate",
        gate="mlp.experts.{}.gate_proj",
        up="mlp.experts.{}.up_proj",
        down="mlp.experts.{}.down_proj",
        count="num_experts",
        used="num_experts_per_tok",
        width="moe_intermediate_size",
        normalized=False,
        shared=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"),
        shared_width=lambda config: config["shared_expert_intermediate_size"],
        shared_gate="mlp.shared_expert_gate",
        required={
            "norm_topk_prob": ((False,), "the runtime's chosen experts have the shares that the softmax over all gives them"),
            "decoder_sparse_step": ((1,), "every layer must be a mixture of experts"),
            "mlp_only_layers": (([], None), "every layer must be a mixture of experts"),
        },
    ),
)
