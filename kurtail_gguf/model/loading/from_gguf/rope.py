"""``rope_parameters`` by a file's keys, and by the tensors in which upstream's converter puts what scales RoPE."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from kurtail_gguf.messages.errors import SourceError
from kurtail_gguf.model.file_form import REMEDY, FileForm, FileKeys

#: Tensors that are no weights but say how RoPE is scaled.
FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
#: Base of RoPE where a file says none: the runtime's.
_BASE = 10000.0
#: YaRN's own numbers, which config.json need not have.
_YARN = {
    "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow", "yarn_attn_factor": "attention_factor",
    "yarn_ext_factor": "extrapolation_factor",
}  # fmt: skip
#: Original contexts that Llama 3's scaling is tried with, and its other two numbers, which are the same in every release.
_CONTEXTS = tuple(2**power for power in range(4, 21))
_LOW, _HIGH = 1.0, 4.0


def rope_parameters(
    keys: FileKeys, form: FileForm, head_dim: int, factors: Mapping[str, list[float]], default: Any
) -> dict[str, Any]:
    """``rope_parameters``, and keys of config.json that go with it.

    Args:
        keys: of the file.
        form: the family's peculiarities.
        head_dim: values of a head.
        factors: values of the tensors above that the file has.
        default: transformers' config of the family without any settings.

    Raises:
        SourceError: a kind of scaling that is not known, or factors that no settings give.
    """
    # phi3's files have it without any scaling too
    original = keys.size("rope.scaling.original_context_length", 0)
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.real("rope.freq_base", _BASE)}
    turned = keys.size("rope.dimension_count", head_dim)
    usual = getattr(default, "rope_parameters", None) or {}
    if turned != head_dim or "partial_rotary_factor" in usual:
        found["partial_rotary_factor"] = turned / head_dim
    kind = keys.get("rope.scaling.type", "none")
    if kind == "none":
        keys.real("rope.scaling.factor", 1.0)
    if FREQUENCIES in factors:
        keys.only("rope.scaling.type", "none")
        found |= _as_llama3(keys, found["rope_theta"], turned, factors[FREQUENCIES])
    elif kind == "linear":
        found |= {"rope_type": "linear", "factor": keys.real("rope.scaling.factor")}
    elif kind == "yarn":
        found |= {
            "rope_type": "yarn", "factor": keys.real("rope.scaling.factor"),
            "original_max_position_embeddings": original or keys.size("context_length"),
        }  # fmt: skip
        found |= {theirs: keys.real(f"rope.scaling.{ours}") for ours, theirs in _YARN.items() if f"rope.scaling.{ours}" in keys}
    elif kind == "longrope" or LONG in factors:
        found |= _as_longrope(keys, original, factors)
    elif kind != "none":
        raise keys.refuse("rope.scaling.type", f"is not supported: {REMEDY}")
    found |= {theirs: keys.real(ours) for theirs, ours in form.rope.items()}
    return {"rope_parameters": _by_kind_of_layer(keys, form, found, usual)}


def _by_kind_of_layer(keys: FileKeys, form: FileForm, found: dict[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """The same twice where transformers has layers with a window and without by themselves; only the latter are scaled."""
    if "sliding_attention" not in usual:
        keys.only("rope.freq_base_swa", found["rope_theta"])
        return found
    base = keys.real("rope.freq_base_swa", form.window_base or found["rope_theta"])
    return {"full_attention": found, "sliding_attention": {"rope_type": "default", "rope_theta": base}}


def _as_llama3(keys: FileKeys, base: float, turned: int, factors: list[float]) -> dict[str, Any]:
    """The settings that give these factors of frequencies; of original contexts that do, the shortest."""
    stored, factor = np.asarray(factors, np.float32), float(np.max(factors))
    frequencies = np.float32(1.0) / np.float32(base) ** (np.arange(0, turned, 2, dtype=np.float32) / np.float32(turned))
    wavelengths = 2 * math.pi / frequencies.astype(np.float64)
    for context in _CONTEXTS:
        smooth = np.clip((context / wavelengths - _LOW) / (_HIGH - _LOW), 0.0, 1.0)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if len(expected) == len(stored) and np.allclose(expected, stored, rtol=1e-5, atol=0):
            return {
                "rope_type": "llama3", "factor": factor, "low_freq_factor": _LOW, "high_freq_factor": _HIGH,
                "original_max_position_embeddings": context,
            }  # fmt: skip
    raise SourceError(
        f"{keys.path}: the {len(factors)} factors of {FREQUENCIES} are none of Llama 3's scaling with low_freq_factor {_LOW:g}, "
        f"high_freq_factor {_HIGH:g} and an original context of a power of two: {REMEDY}"
    )


def _as_longrope(keys: FileKeys, original: int, factors: Mapping[str, list[float]]) -> dict[str, Any]:
    for name in (LONG, SHORT):
        if name not in factors:
            raise SourceError(f"{keys.path} lacks tensor {name} of longrope: the file is incomplete; download it again")
    if original <= 1:
        raise SourceError(f"{keys.path} lacks a usable key {keys.prefix}rope.scaling.original_context_length of longrope: {REMEDY}")
    shortest = {name: [float(str(np.float32(value))) for value in factors[name]] for name in (LONG, SHORT)}
    found = {
        "rope_type": "longrope", "long_factor": shortest[LONG], "short_factor": shortest[SHORT],
        "original_max_position_embeddings": original,
    }  # fmt: skip
    scale, told = keys.size("context_length") / original, keys.real("rope.scaling.attn_factor", 1.0)
    usual = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    return found if math.isclose(told, usual, rel_tol=1e-5) else found | {"attention_factor": told}
