"""Gemma 3, and the text part of those that see: Gemma 2 with heads of q and k normed and no cap on scores, a layer without a
window in six, and RoPE of another base in layers with one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from kurtail_gguf.model.families.gemma2 import FAMILY as GEMMA2
from kurtail_gguf.model.families.gemma2 import check, file_config
from kurtail_gguf.model.file_form import FileForm

#: Layers of the 27B, and layers from one without a window to the next.
_LAYERS_27B, _PERIOD = 62, 6

FAMILY = replace(
    GEMMA2,
    architecture="Gemma3ForCausalLM",
    wrappers={"Gemma3ForConditionalGeneration": "gemma3_text"},
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    heads_first=True,
    attention_cap="",
    refused={**(GEMMA2.refused or {}), "attn_logit_softcapping": "upstream's graph has no cap on Gemma 3's scores"},
    check=partial(check, large=_LAYERS_27B, period=_PERIOD),
    file=FileForm("gemma3", period=_PERIOD, window_base=10000.0, config=partial(file_config, large=_LAYERS_27B)),
)
