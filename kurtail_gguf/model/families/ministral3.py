"""Ministral 3: Mistral's layers, queries multiplied by a number that grows with the position; also the text part of those
that see."""

from __future__ import annotations

from dataclasses import replace

from kurtail_gguf.model.families.mistral import FAMILY as MISTRAL

FAMILY = replace(
    MISTRAL, architecture="Ministral3ForCausalLM", yarn_keys=True, wrappers={"Mistral3ForConditionalGeneration": "ministral3"}
)
