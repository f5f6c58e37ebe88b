"""How RoPE turns: by transformers, from a config, and by the runtime, from a file's keys.

The runtime's half repeats ``ggml_rope_ext`` (ggml/src/ggml-cpu/ops.cpp) and what ``llama_context`` makes of the keys
(src/llama-context.cpp), for the layers without a window of their own.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from kurtail_gguf.messages.errors import SourceError

#: The frequencies that short texts are turned by, and those of texts longer than the original context where they differ.
SHORT, LONG = "short", "long"
#: Where upstream's converter puts factors of frequencies.
_FACTORS = {SHORT: ("rope_freqs.weight", "rope_factors_short.weight"), LONG: ("rope_factors_long.weight",)}
#: Layers of a kind that has no window, where a config turns each kind by its own frequencies.
_FULL = "full_attention"


def checkpoint_turns(config: Any) -> dict[str, tuple[list[float], float]]:
    """What transformers does: radians a position of each pair of values, and what both are multiplied by.

    Args:
        config: transformers' own.

    Returns:
        By :data:`SHORT`, and :data:`LONG` with longrope.

    Raises:
        SourceError: transformers makes no rotary embedding of the config.
    """
    from transformers import MODEL_MAPPING
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    try:
        module = sys.modules[MODEL_MAPPING[type(config)].__module__]
        (kind,) = (
            one for name, one in inspect.getmembers(module, inspect.isclass) if name.endswith("RotaryEmbedding") and one.__module__ == module.__name__
        )
        rotary = kind(config=config)
        prefix = "" if hasattr(rotary, "inv_freq") else f"{_FULL}_"
        frequencies = getattr(rotary, f"{prefix}inv_freq")
        found = {SHORT: (frequencies.tolist(), float(getattr(rotary, f"{prefix}attention_scaling")))}
        if rotary.rope_type == "longrope":
            parameters = getattr(config, "rope_parameters", None) or config.rope_scaling
            beyond = 1 + (parameters.get("original_max_position_embeddings") or config.original_max_position_embeddings)
            frequencies, size = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=beyond)
            found[LONG] = frequencies.tolist(), float(size)
    except Exception as error:  # whatever it stumbles on is the config's fault
        told = " ".join(f"{type(error).__name__} {error}".split())
        raise SourceError(f"{config.name_or_path}: transformers cannot build RoPE from config.json: {told}") from error
    return found


def runtime_turns(
    told: Callable[..., Any], factors: Mapping[str, Sequence[float]], which: str, yarn_keys: bool
) -> tuple[list[float], float]:
    """What the runtime does: radians a position of each pair, and what both are multiplied by.

    Args:
        told: a hyper-parameter of the file by its key behind the architecture, with a default.
        factors: values of the file's tensors that divide frequencies, by their names.
        which: :data:`SHORT` or :data:`LONG`.
        yarn_keys: whether the graph reads YaRN's own keys; else they are constants.
    """
    head_dim = told("attention.key_length", told("embedding_length") // told("attention.head_count"))
    turned = told("rope.dimension_count", head_dim)
    base = told("rope.freq_base", 10000.0)
    factor = told("rope.scaling.factor", 0.0) or 1.0
    divisors = next((factors[name] for name in _FACTORS[which] if name in factors), [1.0] * (turned // 2))
    frequencies = [base ** (-2 * pair / turned) / divisor for pair, divisor in enumerate(divisors)]
    if told("rope.scaling.type") != "yarn":
        return [one / factor for one in frequencies], told("rope.scaling.attn_factor", 1.0)

    def yarn(key: str, default: float) -> float:
        return told(f"rope.scaling.yarn_{key}", default) if yarn_keys else default

    original = told("rope.scaling.original_context_length", told("context_length"))
    low, high = (
        turned * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))
        for rotations in (yarn("beta_fast", 32.0), yarn("beta_slow", 1.0))
    )
    low, high = max(0, math.floor(low)), min(turned - 1, math.ceil(high))
    ramp = [1 - min(1.0, max(0.0, (pair - low) / max(0.001, high - low))) for pair in range(len(frequencies))]
    mixed = [one * part + one / factor * (1 - part) for one, part in zip(frequencies, ramp, strict=True)]
    # the factor's own logarithm is taken out of what the kernel multiplies by, and put in again by it
    size = _mscale(factor, 1.0)
    if (multiplier := yarn("log_multiplier", 0.0)) != 0:
        size /= _mscale(factor, multiplier)
    return mixed, size * told("rope.scaling.attn_factor", 1.0)


def _mscale(factor: float, multiplier: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0
