"""What a checkpoint from anywhere may say and where its files may lie, checked before anybody computes with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kurtail_gguf.messages.errors import SourceError

#: Sizes in config.json and what they are at most: far beyond any model, far below what exhausts memory by itself.
SIZES = {
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 4096,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 8192,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 30,
    "sliding_window": 1 << 30,
    "moe_intermediate_size": 1 << 20,
    "num_local_experts": 4096,
    "num_experts": 4096,
    "num_experts_per_tok": 4096,
    "n_routed_experts": 4096,
    "moe_num_experts": 4096,
    "moe_k": 4096,
    "shared_expert_intermediate_size": 1 << 20,
}
#: Numbers that must be finite and above zero, and what they are at most.
REALS = {
    "rms_norm_eps": 1.0, "rope_theta": 1e12, "embedding_multiplier": 1e6, "residual_multiplier": 1e6,
    "attention_multiplier": 1e6, "logits_scaling": 1e6, "logit_scale": 1e6, "query_pre_attn_scalar": 1e6,
    "attn_logit_softcapping": 1e6, "final_logit_softcapping": 1e6, "layer_norm_eps": 1.0, "norm_eps": 1.0, "norm_epsilon": 1.0,
}  # fmt: skip
#: Keys that may be null, which means the architecture's default.
_MAY_BE_NULL = frozenset(
    {
        "num_key_value_heads", "head_dim", "sliding_window", "n_routed_experts", "num_experts_per_tok", "num_experts",
        "moe_intermediate_size",
    }
)  # fmt: skip
#: Of model types that may have experts or none: how many there are, which may be 0.
_MAY_BE_ZERO = {"granitemoehybrid": "num_local_experts"}
#: Keys of the tokens that begin and end a text: an id, a list of them, or null for none.
_TOKEN_IDS = ("bos_token_id", "eos_token_id")
#: Bytes of a JSON file, at most: an index of 100,000 tensors has 10 MB.
MAX_JSON = 256 << 20


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object from a file that may hold anything.

    Raises:
        SourceError: missing, unreadable, too large, not UTF-8, not JSON, or no object; the message names the file.
    """
    try:
        if (size := path.stat().st_size) > MAX_JSON:
            raise SourceError(f"{path}: {size} bytes of JSON exceed the limit of {MAX_JSON}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist: {remedy}") from None
    except RecursionError:
        raise SourceError(f"{path}: not readable as JSON: nested too deeply") from None
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path}: expected a JSON object")
    return value


def check_sizes(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a size that is no whole number, not positive or huge, and reals that are not finite.

    Args:
        config: config.json as read, or completed by transformers.
        path: of config.json, for the message.

    Raises:
        SourceError: with key, value and limit.
    """
    for key, limit in SIZES.items():
        value = config.get(key, 1)
        if value is None and key in _MAY_BE_NULL:
            continue
        if value == 0 and key == "sliding_window" and config.get("use_sliding_window") is False:
            continue  # what transformers writes for none
        if value == 0 and key == _MAY_BE_ZERO.get(str(config.get("model_type"))):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            raise SourceError(f"{path}: {key} is {_shown(value)}, expected an integer from 1 to {limit}")
    for key, largest in REALS.items():
        value = config.get(key, largest)
        if value is not None and not _real(value, largest):
            raise SourceError(f"{path}: {key} is {_shown(value)}, expected a number above 0 and up to {largest:g}")
    for table in ("rope_parameters", "rope_scaling"):
        if isinstance(config.get(table), Mapping):
            _check_rope(config[table], f"{path}: {table}")


def check_token_ids(config: Mapping[str, Any], vocabulary: int, path: Path) -> None:
    """Refuse tokens for begin and end of text that the vocabulary does not have.

    Upstream's converter leaves such an id out, and the runtime takes one of its own in its place.

    Args:
        config: config.json or generation_config.json as read.
        vocabulary: rows of the embedding.
        path: of that file, for the message.

    Raises:
        SourceError: with key, value and limit.
    """
    for key in _TOKEN_IDS:
        value = config.get(key)
        for one in value if isinstance(value, list) else [] if value is None else [value]:
            if not isinstance(one, int) or isinstance(one, bool) or not 0 <= one < vocabulary:
                raise SourceError(
                    f"{path}: {key} is {_shown(one)}, expected a token id from 0 to {vocabulary - 1}: give the id that the "
                    "tokenizer has for it, or null"
                )


def _check_rope(table: Mapping[str, Any], where: str) -> None:
    """Every real of RoPE's scaling, whatever its kind calls it; transformers looks at some and warns."""
    limit = REALS["rope_theta"]
    for key, value in table.items():
        if key in ("rope_type", "type"):
            if not isinstance(value, str):
                raise SourceError(f"{where}.{key} is {_shown(value)}, expected a name")
        elif isinstance(value, Mapping) and key.endswith("_attention"):
            _check_rope(value, f"{where}.{key}")  # layers of that kind have their own
        elif value is not None and (not isinstance(value, bool) or key in ("rope_theta", "factor")):
            for one in value if isinstance(value, list) else [value]:
                if not _real(one, limit):
                    raise SourceError(f"{where}.{key} is {_shown(one)}, expected a number above 0 and up to {limit:g}")


def _real(value: object, limit: float) -> bool:
    # NaN is below nothing
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= limit


def check_inside(path: Path, directory: Path) -> None:
    """Refuse a symbolic link that leads out of the model's directory.

    The Hugging Face cache is the exception: its ``snapshots/REVISION`` are links to the ``blobs`` beside them.

    Raises:
        SourceError: with the link's target, or for what is no regular file.
    """
    if not path.exists():
        return  # whoever reads it says that it is missing
    target, home = path.resolve(), directory.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise SourceError(f"{path} is a link to {target}, outside the model's directory: copy the file there")
    if not target.is_file():
        raise SourceError(f"{path} is not a regular file")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
