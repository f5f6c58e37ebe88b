"""Every field of config.json that transformers' code of a family reads is understood, or a conversion would ignore it."""

from __future__ import annotations

import ast
import inspect
import sys
from collections import defaultdict

import pytest
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from kurtail_gguf.model.families.registry import FAMILIES
from kurtail_gguf.model.family import Family

#: Fields that only training reads, or that change nothing that is computed.
WITHOUT_EFFECT = {
    "_attn_implementation", "attention_dropout", "embd_pdrop", "embedding_dropout", "hidden_dropout", "initializer_range",
    "output_router_logits", "pad_token_id", "resid_pdrop", "residual_dropout", "router_aux_loss_coef", "router_jitter_noise",
}  # fmt: skip
#: What build_spec, the comparison of RoPE and upstream's converter read of every family.
ALWAYS = {
    "head_dim", "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "original_max_position_embeddings", "partial_rotary_factor", "rope_parameters", "rope_scaling",
    "tie_word_embeddings", "vocab_size",
}  # fmt: skip
#: What a family's own check compares with the runtime's constants, or upstream's converter writes for it by itself.
OWN = {
    # the number of experts by other names
    "Qwen3MoeForCausalLM": {"num_experts"},
    "OlmoeForCausalLM": {"num_local_experts"},
    "Ernie4_5_MoeForCausalLM": {"num_experts", "num_experts_per_tok"},
    # all groups are chosen where there is one
    "Glm4MoeForCausalLM": {"num_local_experts", "topk_group"},
    "Dots1ForCausalLM": {"num_local_experts", "topk_group"},
    "SmolLM3ForCausalLM": {"layer_types", "no_rope_layers", "sliding_window"},
    "GraniteForCausalLM": {"attention_multiplier"},
    "GraniteMoeForCausalLM": {"attention_multiplier"},
    "GraniteMoeSharedForCausalLM": {"attention_multiplier"},
    "Gemma2ForCausalLM": {"query_pre_attn_scalar"},
    "Gemma3ForCausalLM": {
        "query_pre_attn_scalar",
        *("get_text_config", "image_token_id", "mm_tokens_per_image", "text_config", "vision_config"),  # of the one that sees
    },
    "Exaone4ForCausalLM": {"sliding_window_pattern"},
    "Starcoder2ForCausalLM": {"use_bias"},
}


class _Read(defaultdict[str, int]):
    """A config that keeps what it was asked for, and answers 1."""

    def __init__(self) -> None:
        super().__init__(lambda: 1)


def understood(family: Family) -> set[str]:
    """Fields that a family's description names."""
    keys = {
        family.activation_key, family.norm.eps, family.embedding_scale, family.residual_scale, family.logit_divisor,
        family.logit_factor, family.attention_cap, family.logit_cap,
    }  # fmt: skip
    keys |= {*(family.biased_by or ()), *(family.refused or ()), *(family.variants or ())}
    if (experts := family.experts) is not None:
        keys |= {experts.count, experts.used, experts.width, experts.normalized, experts.share_factor, *(experts.required or ())}
        config = _Read()
        if experts.shared_width:
            experts.shared_width(config)
        if experts.dense:
            experts.dense(config, 1)
        keys |= config.keys()
    if family.windows or family.window_of:
        keys.add("sliding_window")
    if family.windows or family.window_of == "layers":
        keys.add("layer_types")
    return keys


def read_by_transformers(architecture: str) -> set[str]:
    """Attributes of ``config`` and ``self.config`` in the module that has the architecture."""
    model = next(
        one for models in MODEL_FOR_CAUSAL_LM_MAPPING.values() for one in (models if isinstance(models, tuple) else (models,))
        if one.__name__ == architecture
    )  # fmt: skip
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(sys.modules[model.__module__]))):
        if isinstance(node, ast.Attribute) and _is_config(node.value):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr" and _is_config(node.args[0]):
            found.add(ast.literal_eval(node.args[1]))
    return found


def _is_config(node: ast.expr) -> bool:
    return (node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")) == "config"


@pytest.mark.parametrize("architecture", FAMILIES)
def test_nothing_is_read_that_is_not_understood(architecture):
    read = read_by_transformers(architecture)
    assert {"hidden_size", "num_hidden_layers"} <= read
    assert read <= WITHOUT_EFFECT | ALWAYS | OWN.get(architecture, set()) | understood(FAMILIES[architecture])
