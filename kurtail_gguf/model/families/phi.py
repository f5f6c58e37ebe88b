"""Phi-1, 1.5 and 2: attention and a FFN without a gate read the same LayerNorm; biases everywhere, in the head too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kurtail_gguf.model.family import Family
from kurtail_gguf.model.file_form import FileForm
from kurtail_gguf.model.norms import NormForm


def _check(config: Mapping[str, Any]) -> tuple[str, str] | None:
    if config["intermediate_size"] != 4 * config["hidden_size"]:
        return "intermediate_size", "upstream's converter assumes 4 times hidden_size for Phi"
    if config.get("num_key_value_heads") not in (None, config["num_attention_heads"]):
        return "num_key_value_heads", "upstream's converter assumes num_attention_heads for Phi"
    return None


FAMILY = Family(
    architecture="PhiForCausalLM",
    file=FileForm("phi2"),
    whole_heads=True,
    norm=NormForm(centred=True, biased=True, eps="layer_norm_eps"),
    parallel=True,
    ffn_norm="",
    attention_writer="self_attn.dense",
    ffn_readers=("mlp.fc1",),
    gated=False,
    up="mlp.fc1",
    activation="gelu",
    ffn_writer="mlp.fc2",
    always_biased=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2"),
    head_bias=True,
    refused={
        "qk_layernorm": "upstream's graph has no norms of q and k for Phi",
        "tie_word_embeddings": "upstream's graph requires an untied head for Phi",
    },
    check=_check,
    final_norm="model.final_layernorm",
)
