"""Olmo 3: Olmo 2 with a window in three of four layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kurtail_gguf.model.families.olmo2 import FAMILY as OLMO2
from kurtail_gguf.model.file_form import FileForm, FileKeys


def _check(config: Mapping[str, Any]) -> tuple[str, str] | None:
    each = config["rope_parameters"]
    if each["sliding_attention"]["rope_theta"] != each["full_attention"]["rope_theta"]:
        return "rope_parameters", "upstream's graph has one base of RoPE for layers with and without a window"
    return None


def _has_windows(keys: FileKeys) -> bool:
    return bool(keys.get("attention.sliding_window", 0))


FAMILY = replace(OLMO2, architecture="Olmo3ForCausalLM", windows=True, check=_check, file=FileForm("olmo2", told_by=_has_windows, period=4))
