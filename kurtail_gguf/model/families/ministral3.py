"""Ministral 3: Mistral's layers, queries multiplied by a number that grows with the position; also the text part of those
that see."""

from __future__ import annotations

from dataclasses import replace

from kurtail_gguf.model.families.mistral import FAMILY as MISTRAL
from kurtail_gguf.model.file_form import FileForm

FAMILY = replace(
    MISTRAL,
    architecture="Ministral3ForCausalLM",
    file=FileForm(
        "mistral3", told_by=lambda keys: "attention.temperature_scale" in keys,
        # upstream's converter writes one of two that are the same
        rope={"mscale_all_dim": "rope.scaling.yarn_log_multiplier", "mscale": "rope.scaling.yarn_log_multiplier",
              "llama_4_scaling_beta": "attention.temperature_scale"},
    ),
    yarn_keys=True,
    wrappers={"Mistral3ForConditionalGeneration": "ministral3"},
)  # fmt: skip
