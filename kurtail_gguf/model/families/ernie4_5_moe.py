"""ERNIE 4.5 MoE: ERNIE 4.5's attention; the first layers with a FFN, the others with experts, chosen by their share of a softmax and
a bias, and one that all tokens go through."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kurtail_gguf.model.families.ernie4_5 import FAMILY as ERNIE4_5
from kurtail_gguf.model.families.glm4_moe import FAMILY as GLM4_MOE
from kurtail_gguf.model.family import ExpertNames
from kurtail_gguf.model.file_form import FileForm, FileKeys


def _file_config(keys: FileKeys) -> dict[str, Any]:
    # what upstream's converter writes for it is intermediate_size over heads of k and v
    keys.size("expert_shared_feed_forward_length", 0)
    return {"moe_layer_end_index": keys.size("block_count") - 1}


FAMILY = replace(
    ERNIE4_5,
    architecture="Ernie4_5_MoeForCausalLM",
    file=FileForm(
        "ernie4_5-moe", keys={"leading_dense_block_count": "moe_layer_start_index", "interleave_moe_layer_step": "moe_layer_interval",
                             "expert_shared_count": "moe_num_shared_experts"}, config=_file_config,
    ),
    refused={"use_bias": "upstream's graph has no biases in the FFN for ERNIE 4.5"},
    experts=ExpertNames(
        count="moe_num_experts",
        used="moe_k",
        width="moe_intermediate_size",
        choice_bias="mlp.moe_statics.e_score_correction_bias",
        choice_bias_row=True,
        module_choice_bias="mlp.gate.moe_statics.e_score_correction_bias",
        shared=GLM4_MOE.experts.shared,
        shared_width=lambda config: config["moe_intermediate_size"] * config["moe_num_shared_experts"],
        dense=lambda config, layer: (
            not config["moe_layer_start_index"] <= layer <= config["moe_layer_end_index"]
            or (layer + 1) % config["moe_layer_interval"] != 0
        ),
        required={"moe_norm_min": ((1e-12, None), "shares of the chosen experts are divided by their sum, however small")},
    ),
)
