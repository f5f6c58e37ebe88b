"""Mixtral: Mistral's attention, and experts that the checkpoint calls w1 (gate), w3 (up) and w2 (down)."""

from __future__ import annotations

from dataclasses import replace

from kurtail_gguf.model.families.mistral import FAMILY as MISTRAL
from kurtail_gguf.model.family import ExpertNames
from kurtail_gguf.model.file_form import FileForm

FAMILY = replace(
    MISTRAL,
    architecture="MixtralForCausalLM",
    file=FileForm("llama", told_by=lambda keys: keys.get("expert_count", 0) != 0),
    wrappers=None,
    experts=ExpertNames(
        router="block_sparse_moe.gate",
        gate="block_sparse_moe.experts.{}.w1",
        up="block_sparse_moe.experts.{}.w3",
        down="block_sparse_moe.experts.{}.w2",
        count="num_local_experts",
        width="intermediate_size",
    ),
)
