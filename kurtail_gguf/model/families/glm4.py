"""GLM-4 (dense, 0414): Phi-3's fused FFN, biases of q, k and v, norms before and behind attention and FFN, and RoPE on half of a
head, its pairs side by side in the checkpoint already."""

from __future__ import annotations

from kurtail_gguf.model.family import Family
from kurtail_gguf.model.file_form import FileForm

FAMILY = Family(
    architecture="Glm4ForCausalLM",
    file=FileForm("glm4"),
    attention_post_norm="post_self_attn_layernorm",
    ffn_post_norm="post_mlp_layernorm",
    ffn_readers=("mlp.gate_up_proj",),
    up="mlp.gate_up_proj",
    interleaved=True,
    biased_by={"attention_bias": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")},
)
