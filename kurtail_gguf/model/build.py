"""A family and a config to the sizes of one model, or why it cannot be converted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from kurtail_gguf.messages.errors import UnsupportedArchitecture
from kurtail_gguf.model.family import ACTIVATIONS, Family
from kurtail_gguf.model.spec import ModelSpec

#: Values in a quantization block: every row length of a block linear is a multiple.
_BLOCK = 64
#: What config.json calls a layer that attends to a window only.
_SLIDING = "sliding_attention"

_Refuse = Callable[[str, object, str], UnsupportedArchitecture]


def build_spec(family: Family, config: Mapping[str, Any]) -> ModelSpec:
    """Sizes from a complete config (``AutoConfig…to_dict()``, so that defaults are filled in).

    Raises:
        UnsupportedArchitecture: a feature that cannot be converted exactly, or a row length that is no
            multiple of 64; the message names key, value and limit.
    """
    name = family.architecture
    for key, fields in (family.variants or {}).items():
        if config.get(key):
            family = replace(family, **fields)
    if family.experts is not None and family.experts.shared_width is not None and not family.experts.shared_width(config):
        family = replace(family, experts=replace(family.experts, shared=(), shared_width=None, shared_gate=""))

    def refuse(key: str, value: object, limit: str) -> UnsupportedArchitecture:
        return UnsupportedArchitecture(f"{name}: {key} {value} is not supported: {limit}")

    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise refuse("quantization_config", method, "start from the unquantized checkpoint")
    for key, reason in (family.refused or {}).items():
        if config.get(key):
            raise refuse(key, config[key], reason)
    if family.check is not None and (found := family.check(config)) is not None:
        raise refuse(found[0], config.get(found[0]), found[1])
    hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    if heads % kv_heads:
        raise refuse("num_key_value_heads", kv_heads, f"it must divide num_attention_heads {heads}")
    activation = config.get(family.activation_key, family.activation)
    if activation not in ACTIVATIONS[family.activation]:
        raise refuse(family.activation_key, activation, f"the runtime computes {ACTIVATIONS[family.activation][0]}")
    width = "intermediate_size" if family.experts is None else family.experts.width
    dense = frozenset(layer for layer in range(layers) if family.experts and family.experts.dense and family.experts.dense(config, layer))
    experts = _experts(family, config, refuse)
    rows = {
        "hidden_size": hidden,
        width: config[width],
        "num_attention_heads x head_dim": heads * head_dim,
        "width of shared experts": experts.get("shared_width", 0),
    }
    if dense:
        rows["intermediate_size"] = config["intermediate_size"]
    for key, value in rows.items():
        if value % _BLOCK:
            raise refuse(key, value, f"it must be a multiple of {_BLOCK}")
    if family.whole_heads and heads * head_dim != hidden:
        raise refuse("head_dim", head_dim, f"upstream's graph has hidden_size / num_attention_heads, {hidden / heads:g}, for {name}")
    window = _window(family, config)
    turned = family.turned or (lambda _config, _layer: True)
    spec = ModelSpec(
        family=family,
        layers=layers,
        hidden_size=hidden,
        intermediate_size=config[width],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings")),
        window=0 if family.windows else window,
        biased=family.biased(config),
        eps=float(config[family.norm.eps]),
        rotary_dim=_rotary_dim(config, head_dim),
        windows=_windows(config, layers, window, refuse) if family.windows else (),
        unturned=frozenset(layer for layer in range(layers) if not turned(config, layer)),
        embedding_scale=hidden**0.5 if family.rooted_embedding else _number(config, family.embedding_scale),
        residual_scale=_number(config, family.residual_scale),
        logit_divisor=_number(config, family.logit_divisor) / _number(config, family.logit_factor),
        attention_cap=float(config.get(family.attention_cap) or 0),
        logit_cap=float(config.get(family.logit_cap) or 0),
        **experts,
    )
    if not dense:
        return spec
    without = replace(
        spec, family=replace(family, experts=None), intermediate_size=config["intermediate_size"], experts=0, experts_used=0,
        shared_width=0,
    )  # fmt: skip
    return replace(spec, dense=without, dense_layers=dense)


def _experts(family: Family, config: Mapping[str, Any], refuse: _Refuse) -> dict[str, Any]:
    names = family.experts
    if names is None:
        return {}
    for key, (allowed, reason) in (names.required or {}).items():
        if config.get(key) not in allowed:
            raise refuse(key, config.get(key), reason)
    count, used = config[names.count], config[names.used]
    if not 0 < used <= count:
        raise refuse(names.used, used, f"it must be from 1 to {names.count} {count}")
    normalized = bool(config.get(names.normalized)) if isinstance(names.normalized, str) else names.normalized
    return {
        "experts": count,
        "experts_used": used,
        "shared_width": names.shared_width(config) if names.shared_width else 0,
        "normalized": normalized,
        "share_factor": _number(config, names.share_factor),
    }


def _rotary_dim(config: Mapping[str, Any], head_dim: int) -> int:
    # transformers 5 keeps it with the other parameters of RoPE
    parameters = config.get("rope_parameters") or {}
    return int(head_dim * float(parameters.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)))


def _number(config: Mapping[str, Any], key: str) -> float:
    return float(config[key]) if key else 1.0


def _window(family: Family, config: Mapping[str, Any]) -> int:
    """The window that some layer has; 0 where none has one that is shorter than the context."""
    # Qwen2's config has none unless use_sliding_window is set
    window = config.get("sliding_window") or 0
    if family.windows:
        return window
    if not family.window_of or (family.window_of == "layers" and _SLIDING not in (config.get("layer_types") or ())):
        return 0
    return window if window < config["max_position_embeddings"] else 0


def _windows(config: Mapping[str, Any], layers: int, window: int, refuse: _Refuse) -> tuple[int, ...]:
    types = config.get("layer_types")
    if not isinstance(types, list) or len(types) != layers:
        raise refuse("layer_types", types, f"it must list the kind of each of the {layers} layers")
    if _SLIDING in types and not window:
        raise refuse("sliding_window", config.get("sliding_window"), f"layers are {_SLIDING}")
    return tuple(window if kind == _SLIDING else 0 for kind in types)
