"""Cohere 2 (Command R7B and A): attention and FFN read the same LayerNorm, three of four layers have a window and RoPE, the
others neither; pairs of RoPE lie side by side in the checkpoint already, and logits are multiplied by a number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kurtail_gguf.model.family import Family
from kurtail_gguf.model.file_form import FileForm, FileKeys
from kurtail_gguf.model.norms import NormForm

_PERIOD = 4


def _turned(config: Mapping[str, Any], layer: int) -> bool:
    return config["layer_types"][layer] == "sliding_attention"


def _check(config: Mapping[str, Any]) -> tuple[str, str] | None:
    layers = range(config["num_hidden_layers"])
    if config["layer_types"] != ["full_attention" if (layer + 1) % _PERIOD == 0 else "sliding_attention" for layer in layers]:
        return "layer_types", f"the runtime computes full attention in one of every {_PERIOD} layers and a window in the others"
    if not config["tie_word_embeddings"]:
        return "tie_word_embeddings", "upstream's graph has no untied head for Cohere 2"
    if config["num_attention_heads"] * config["head_dim"] != config["hidden_size"]:
        return "head_dim", "upstream's graph requires heads that add up to hidden_size"
    return None


def _file_config(keys: FileKeys) -> dict[str, Any]:
    # upstream's converter reads a key of its own
    return {"rotary_pct": keys.size("rope.dimension_count") / keys.size("attention.key_length")}


FAMILY = Family(
    architecture="Cohere2ForCausalLM",
    file=FileForm("cohere2", period=_PERIOD, config=_file_config),
    rope_factors=True,
    norm=NormForm(centred=True, eps="layer_norm_eps"),
    parallel=True,
    ffn_norm="",
    interleaved=True,
    turned=_turned,
    windows=True,
    logit_factor="logit_scale",
    refused={"attention_bias": "upstream's converter requires no biases for Cohere 2"},
    check=_check,
)
