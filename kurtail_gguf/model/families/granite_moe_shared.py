"""Granite MoE with an expert that all tokens go through, which the checkpoint keeps as a linear for gate and up and one for down."""

from __future__ import annotations

from dataclasses import replace

from kurtail_gguf.model.families.granite_moe import FAMILY as GRANITE_MOE
from kurtail_gguf.model.file_form import FileForm

_SHARED = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj")

_SHARED_WIDTH = "expert_shared_feed_forward_length"

FAMILY = replace(
    GRANITE_MOE,
    architecture="GraniteMoeSharedForCausalLM",
    file=FileForm(
        "granitemoe", told_by=lambda keys: _SHARED_WIDTH in keys,
        keys={"attention.scale": "attention_multiplier", _SHARED_WIDTH: "shared_intermediate_size"},
    ),
    experts=replace(
        GRANITE_MOE.experts,
        shared=_SHARED,
        shared_width=lambda config: config["shared_intermediate_size"],
        module_shared=("shared_mlp.input_linear", "shared_mlp.output_linear"),
        fused=dict(GRANITE_MOE.experts.fused) | {
            "shared_mlp.input_linear.weight": tuple(f"{name}.weight" for name in _SHARED[:2]),
            "shared_mlp.output_linear.weight": (f"{_SHARED[2]}.weight",),
        },
    ),
)  # fmt: skip
