"""Gemma 2: norms before and behind attention and FFN, gains of 1 + weight, GELU, caps on scores and logits, every second layer
with a window. R1 does not commute with the norms behind, and keys have no offset, as the cap would see it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kurtail_gguf.model.family import Family
from kurtail_gguf.model.file_form import FileForm, FileKeys
from kurtail_gguf.model.norms import NormForm

#: Layers of the 27B, whose scores upstream's graph scales by what the width leaves a head.
_LAYERS_27B = 46


def check(config: Mapping[str, Any], large: int = _LAYERS_27B, period: int = 2) -> tuple[str, str] | None:
    """What upstream's graph has as constants, by the number of layers: the scale of scores, and which layers have windows.

    Args:
        config: the model's.
        large: layers of the one model with a scale of its own.
        period: layers from one without a window to the next.
    """
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    scale = config["hidden_size"] // heads if layers == large else config["head_dim"]
    if config["query_pre_attn_scalar"] != scale:
        return "query_pre_attn_scalar", f"the runtime has {scale}"
    types = ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(layers)]
    if config["sliding_window"] and config["layer_types"] != types:
        return "layer_types", f"the runtime computes full attention in one of every {period} layers and a window in the others"
    return None


def _tied(config: Mapping[str, Any]) -> tuple[str, str] | None:
    if not config["tie_word_embeddings"]:
        return "tie_word_embeddings", "upstream's graph has no untied head for Gemma 2"
    return check(config)



def file_config(keys: FileKeys, large: int = _LAYERS_27B) -> dict[str, Any]:
    """The scale of scores, of which a file says nothing; arguments as :func:`check`'s."""
    width = keys.size("embedding_length") // keys.size("attention.head_count")
    return {"query_pre_attn_scalar": width if keys.size("block_count") == large else keys.size("attention.key_length")}


FAMILY = Family(
    architecture="Gemma2ForCausalLM",
    norm=NormForm(offset=1.0),
    ffn_norm="pre_feedforward_layernorm",
    attention_post_norm="post_attention_layernorm",
    ffn_post_norm="post_feedforward_layernorm",
    activation="gelu",
    activation_key="hidden_activation",
    windows=True,
    rooted_embedding=True,
    attention_cap="attn_logit_softcapping",
    logit_cap="final_logit_softcapping",
    refused={
        "attention_bias": "upstream's graph has no biases for Gemma",
        "use_bidirectional_attention": "upstream's graph is causal",
    },
    check=_tied,
    file=FileForm("gemma2", period=2, config=file_config),
)
