"""GLM-4.5 and 4.6: Llama's layers, biases of q, k and v, RoPE on half of a head; the first layers with a FFN, the others with
experts that a sigmoid scores, chosen by those scores and a bias, and one that all tokens go through."""

from __future__ import annotations

from kurtail_gguf.model.family import ExpertNames, Family
from kurtail_gguf.model.file_form import FileForm

FAMILY = Family(
    architecture="Glm4MoeForCausalLM",
    file=FileForm(
        "glm4moe", keys={"leading_dense_block_count": "first_k_dense_replace", "expert_shared_count": "n_shared_experts"},
        config=lambda _keys: {"num_nextn_predict_layers": 0},  # such layers are left out
    ),
    biased_by={"attention_bias": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")},
    variants={"use_qk_norm": {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}},
    file_norms={"post_attention_layernorm": "post_attention_norm"},
    experts=ExpertNames(
        count="n_routed_experts",
        width="moe_intermediate_size",
        scores="sigmoid",
        choice_bias="mlp.gate.e_score_correction_bias",
        normalized="norm_topk_prob",
        share_factor="routed_scaling_factor",
        shared=("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj"),
        shared_width=lambda config: config["moe_intermediate_size"] * config["n_shared_experts"],
        dense=lambda config, layer: layer < config["first_k_dense_replace"],
        required={"n_group": ((1,), "experts must be of one group")},
    ),
)
