"""config.json by a file's keys: the converse of what upstream's converter makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kurtail_gguf.messages.errors import SourceError, UnsupportedArchitecture
from kurtail_gguf.model.families.registry import FAMILIES
from kurtail_gguf.model.family import ExpertNames, Family
from kurtail_gguf.model.file_form import REMEDY, FileKeys
from kurtail_gguf.model.loading.from_gguf.rope import rope_parameters
from kurtail_gguf.model.loading.untrusted import check_sizes
from kurtail_gguf.model.names import EMBEDDING, HEAD, file_part

#: Key of the file -> key of config.json, where both mean the same in every family.
_SIZES = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
}  # fmt: skip
_EPS = ("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon")
#: ``gguf.ExpertGatingFuncType``.
_SCORES = {"softmax": 1, "sigmoid": 2}
#: Keys that change nothing of the model, by the values with which they do not; None for whatever they say.
_NEUTRAL: Mapping[str, tuple[Any, ...] | None] = {
    "tensor_data_layout": None, "rope.scaling.finetuned": None, "attention.causal": (True,), "pooling_type": (0,),
    "expert_group_count": (1, 0), "expert_group_used_count": (1, 0), "expert_weights_norm": (False, True),
}  # fmt: skip
_TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}


def find_file_family(keys: FileKeys, name: str) -> Family:
    """The family that a file of ``general.architecture`` ``name`` is read as.

    Raises:
        UnsupportedArchitecture: there is none.
    """
    for family in FAMILIES.values():
        form = family.file
        if form is not None and form.name == name and (form.told_by is None or form.told_by(keys)):
            return family
    known = ", ".join(sorted({family.file.name for family in FAMILIES.values() if family.file is not None}))
    raise UnsupportedArchitecture(
        f"{keys.path}: architecture {name} is not read from a GGUF; read: {known}: download the original model in Hugging "
        "Face format and give its directory"
    )


def file_config(keys: FileKeys, family: Family, metadata: Mapping[str, Any], factors: Mapping[str, list[float]]) -> dict[str, Any]:
    """config.json of a file; what it says nothing of is transformers' default.

    Args:
        keys: of the file; all are asked for.
        family: which it is of.
        metadata: all keys, for those of the vocabulary.
        factors: values of the tensors that scale RoPE, by name.

    Raises:
        SourceError: a key that is missing, or that no key of config.json stands for: what it says would be lost.
    """
    import transformers

    form = family.file
    assert form is not None
    model_type = getattr(transformers, family.architecture).config_class.model_type
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": model_type, "dtype": "float32"}
    config |= {theirs: keys.size(ours) for ours, theirs in _SIZES.items()}
    config["num_hidden_layers"] = keys.size("block_count") - keys.size("nextn_predict_layers", 0)
    check_sizes(config, keys.path)  # lists are made as long as the layers are many
    config["vocab_size"] = _vocabulary(keys, metadata)
    config["tie_word_embeddings"] = HEAD not in keys.shapes
    config |= _token_ids(metadata, config["vocab_size"])
    eps = {keys.real(key) for key in _EPS if key in keys}
    if len(eps) != 1:
        raise keys.refuse(_EPS[0], f"and {_EPS[1]} must be one number: {REMEDY}")
    config[family.norm.eps] = eps.pop()
    if "attention.key_length" in keys:
        config["head_dim"] = keys.size("attention.key_length")
        keys.only("attention.value_length", config["head_dim"])
    config |= _biases(keys, family) | _multipliers(keys, family) | _windows(keys, family, config["num_hidden_layers"])
    config |= _experts(keys, family.experts)
    for ours, theirs in form.keys.items():
        value = keys.get(ours)
        config[theirs] = value if isinstance(value, int) else keys.real(ours)
    check_sizes(config, keys.path)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if head_dim < 1:
        raise keys.refuse("attention.head_count", f"is more than the {config['hidden_size']} values of embedding_length: {REMEDY}")
    config |= rope_parameters(keys, form, head_dim, factors, transformers.AutoConfig.for_model(model_type))
    if form.config is not None:
        config |= form.config(keys)
    _check_nothing_left(keys)
    check_sizes(config, keys.path)
    return config


def _vocabulary(keys: FileKeys, metadata: Mapping[str, Any]) -> int:
    tokens = metadata.get("tokenizer.ggml.tokens")
    count = tokens["length"] if isinstance(tokens, dict) else len(tokens) if isinstance(tokens, list) else 0
    if EMBEDDING not in keys.shapes:
        raise SourceError(f"{keys.path} lacks tensor {EMBEDDING} (the embedding): the file is incomplete; download it again")
    rows = keys.shapes[EMBEDDING][0]
    keys.only("vocab_size", rows)
    if count != rows:
        raise SourceError(
            f"{keys.path}: the vocabulary has {count} tokens, but the embedding has {rows} rows: the file is damaged; download it "
            f"again, or {REMEDY}"
        )
    return rows


def _token_ids(metadata: Mapping[str, Any], vocabulary: int) -> dict[str, int | None]:
    found = {theirs: metadata.get(f"tokenizer.ggml.{ours}_token_id") for ours, theirs in _TOKENS.items()}
    # transformers makes the embedding with it, and upstream's converter writes no more than what the file has
    pad = found["pad_token_id"]
    return found | {"pad_token_id": pad if isinstance(pad, int) and 0 <= pad < vocabulary else None}


def _biases(keys: FileKeys, family: Family) -> dict[str, bool]:
    """Switches for biases, and for norms of q and k, by the tensors that are there."""
    found = {
        switch: any(f"blk.0.{file_part(family, linear)[0]}.bias" in keys.shapes for linear in linears)
        for switch, linears in (family.biased_by or {}).items()
    }
    normed = "blk.0.attn_q_norm.weight" in keys.shapes
    return found | {switch: normed for switch, fields in (family.variants or {}).items() if "query_norm" in fields}


def _multipliers(keys: FileKeys, family: Family) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    numbers = {
        "embedding_scale": family.embedding_scale, "residual_scale": family.residual_scale,
        "logit_scale": family.logit_divisor or family.logit_factor,
    }  # fmt: skip
    for ours, theirs in numbers.items():
        if theirs:
            found[theirs] = keys.real(ours, 1.0)
    if family.attention_cap:
        found[family.attention_cap] = keys.real("attn_logit_softcapping")
    if family.logit_cap:
        found[family.logit_cap] = keys.real("final_logit_softcapping", None)
    return found


def _windows(keys: FileKeys, family: Family, layers: int) -> dict[str, Any]:
    form = family.file
    assert form is not None
    if not family.windows:
        if family.window_of != "all":
            return {}
        return {"sliding_window": keys.size("attention.sliding_window", 0) or None}
    window = keys.size("attention.sliding_window", 0) or None
    pattern = keys.get("attention.sliding_window_pattern", form.period)
    if window is None:
        pattern = [False] * layers
    elif not isinstance(pattern, list):
        period = keys.size("attention.sliding_window_pattern", form.period)
        if period < 1:
            raise keys.refuse("attention.sliding_window_pattern", f"must be above 0: {REMEDY}")
        pattern = [(layer + 1) % period != 0 for layer in range(layers)]
    return {"sliding_window": window, "layer_types": ["sliding_attention" if one else "full_attention" for one in pattern]}


def _experts(keys: FileKeys, names: ExpertNames | None) -> dict[str, Any]:
    if names is None:
        keys.only("expert_count", 0)
        keys.only("expert_used_count", 0)
        return {}
    found: dict[str, Any] = {key: allowed[0] for key, (allowed, _) in (names.required or {}).items()}
    found |= {names.count: keys.size("expert_count"), names.used: keys.size("expert_used_count")}
    if names.width != "intermediate_size":
        found[names.width] = keys.size("expert_feed_forward_length")
    if names.share_factor:
        found[names.share_factor] = keys.real("expert_weights_scale", 1.0)
    if isinstance(names.normalized, str):
        found[names.normalized] = keys.flag("expert_weights_norm", False)
    keys.only("expert_gating_func", _SCORES[names.scores])
    return found


def _check_nothing_left(keys: FileKeys) -> None:
    for key in keys.unasked():
        allowed = _NEUTRAL.get(key, ())
        if allowed is not None:
            if not allowed:
                raise keys.refuse(key, f"has no counterpart in config.json and would be lost: {REMEDY}")
            keys.only(key, *allowed)
