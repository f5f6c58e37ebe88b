"""Granite 3 MoE: Granite's layers and multipliers; every layer a mixture of experts, of which the checkpoint keeps all of a layer in
two tensors."""

from __future__ import annotations

from dataclasses import replace

from kurtail_gguf.model.families.granite import FAMILY as GRANITE
from kurtail_gguf.model.family import ExpertNames
from kurtail_gguf.model.file_form import FileForm

_SHARED_WIDTH = "expert_shared_feed_forward_length"

FAMILY = replace(
    GRANITE,
    architecture="GraniteMoeForCausalLM",
    file=FileForm(
        "granitemoe", told_by=lambda keys: _SHARED_WIDTH not in keys, keys={"attention.scale": "attention_multiplier"}
    ),
    biased_by={},
    refused={"attention_bias": "upstream's graph has no bias at attention's output for Granite MoE"},
    experts=ExpertNames(
        block="block_sparse_moe",
        router="block_sparse_moe.router.layer",
        module_router="block_sparse_moe.router",
        gate="block_sparse_moe.experts.{}.w1",
        up="block_sparse_moe.experts.{}.w3",
        down="block_sparse_moe.experts.{}.w2",
        fused={
            "block_sparse_moe.input_linear.weight": (
                "block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight",
            ),
            "block_sparse_moe.output_linear.weight": ("block_sparse_moe.experts.{}.w2.weight",),
        },
        count="num_local_experts",
        width="intermediate_size",
    ),
)  # fmt: skip
