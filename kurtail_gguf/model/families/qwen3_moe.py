"""Qwen3-MoE: Qwen3's attention; every layer a mixture of experts, as in the released models."""

from __future__ import annotations

from dataclasses import replace

from kurtail_gguf.model.families.qwen3 import FAMILY as QWEN3
from kurtail_gguf.model.family import ExpertNames
from kurtail_gguf.model.file_form import FileForm

FAMILY = replace(
    QWEN3,
    architecture="Qwen3MoeForCausalLM",
    file=FileForm("qwen3moe"),
    window_of="all",
    experts=ExpertNames(
        count="num_local_experts",  # transformers reads the released num_experts as this
        width="moe_intermediate_size",
        required={
            "norm_topk_prob": ((True,), "in the runtime the weights of the chosen experts always add up to 1"),
            "decoder_sparse_step": ((1,), "every layer must be a mixture of experts"),
            "mlp_only_layers": (([], None), "every layer must be a mixture of experts"),
        },
    ),
)
