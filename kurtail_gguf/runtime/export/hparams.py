"""What upstream's converter reads of config.json, in the words that it knows.

It takes transformers' configuration as a dictionary. Newer versions of transformers write some keys by other names or values, and
give defaults to keys that a checkpoint's own config.json does not have, wherefrom upstream concludes what is not so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: Kinds of layers as they were called, by what they are called now.
_KINDS = {"full_attention": "attention", "linear_attention": "mamba"}
#: Letters of Nemotron-H's layers.
_LETTERS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "mlp": "-", "moe": "E"}


def known_to_upstream(architecture: str, hparams: dict[str, Any]) -> dict[str, Any]:
    """A model's hyper-parameters in upstream's words.

    Args:
        architecture: as config.json has it.
        hparams: what transformers makes of config.json.
    """
    known = dict(hparams)
    _CHANGED[architecture](known)
    return known


def has_other_words(architecture: str) -> bool:
    """Whether upstream's converter must be told otherwise than by transformers."""
    return architecture in _CHANGED


def _forget(hparams: dict[str, Any], *keys: str) -> None:
    """Where keys of experts are there upstream takes a model for a mixture of them."""
    for key in keys:
        hparams.pop(key, None)


def _granite_hybrid(hparams: dict[str, Any]) -> None:
    hparams["layer_types"] = [_KINDS.get(kind, kind) for kind in hparams.get("layer_types") or ()]
    if not hparams.get("num_local_experts"):
        _forget(hparams, "num_local_experts", "num_experts_per_tok")


def _nemotron_h(hparams: dict[str, Any]) -> None:
    kinds = hparams.get("layers_block_type") or ()
    hparams["hybrid_override_pattern"] = "".join(_LETTERS[kind] for kind in kinds)
    if "moe" not in kinds:
        _forget(hparams, "num_experts_per_tok", "n_routed_experts", "n_shared_experts", "n_group", "topk_group")


def _gpt_neox(hparams: dict[str, Any]) -> None:
    parameters = hparams.get("rope_parameters") or {}
    hparams.setdefault("rotary_pct", parameters.get("partial_rotary_factor", 1.0))


_CHANGED: dict[str, Callable[[dict[str, Any]], None]] = {
    "GraniteMoeHybridForCausalLM": _granite_hybrid,
    "NemotronHForCausalLM": _nemotron_h,
    "GPTNeoXForCausalLM": _gpt_neox,
}
