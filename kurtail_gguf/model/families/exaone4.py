"""EXAONE 4: norms behind attention and FFN only, as Olmo 2, and heads of q and k normed one by one. The 32B has windows in
three of four layers, and RoPE in those alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kurtail_gguf.model.family import Family
from kurtail_gguf.model.file_form import FileForm

#: Layers of the 32B, by which upstream's graph knows that a model has windows.
_LAYERS_32B = 64


def _turned(config: Mapping[str, Any], layer: int) -> bool:
    return config["sliding_window"] is None or config["layer_types"][layer] == "sliding_attention"


def _check(config: Mapping[str, Any]) -> tuple[str, str] | None:
    if (config["num_hidden_layers"] == _LAYERS_32B) != (config["sliding_window"] is not None):
        return "sliding_window", f"upstream's graph has windows for models of {_LAYERS_32B} layers only"
    if config["num_attention_heads"] * (config.get("head_dim") or 0) not in (0, config["hidden_size"]):
        return "head_dim", "upstream's graph requires heads that add up to hidden_size"
    return None


FAMILY = Family(
    architecture="Exaone4ForCausalLM",
    file=FileForm("exaone4", period=4),
    rope_factors=True,
    attention_norm="",
    attention_post_norm="post_attention_layernorm",
    ffn_norm="",
    ffn_post_norm="post_feedforward_layernorm",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    heads_first=True,
    windows=True,
    turned=_turned,
    check=_check,
)
