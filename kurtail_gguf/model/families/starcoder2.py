"""StarCoder 2: LayerNorm and biases everywhere, and a FFN without a gate, whose output's input takes no diagonal: GELU lies
between it and what could be scaled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kurtail_gguf.model.family import Family
from kurtail_gguf.model.file_form import FileForm
from kurtail_gguf.model.norms import NormForm


def _check(config: Mapping[str, Any]) -> tuple[str, str] | None:
    return None if config["use_bias"] else ("use_bias", "upstream's graph requires biases for StarCoder 2")


FAMILY = Family(
    architecture="Starcoder2ForCausalLM",
    file=FileForm("starcoder2"),
    window_of="all",
    whole_heads=True,
    norm=NormForm(centred=True, biased=True, eps="norm_epsilon"),
    ffn_readers=("mlp.c_fc",),
    gated=False,
    up="mlp.c_fc",
    activation="gelu",
    ffn_writer="mlp.c_proj",
    always_biased=(
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), "mlp.c_fc", "mlp.c_proj",
    ),
    check=_check,
)  # fmt: skip
