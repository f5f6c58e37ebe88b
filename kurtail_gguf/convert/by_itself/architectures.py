"""What becomes of each architecture that upstream's converter knows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kurtail_gguf.convert.by_itself.conversion import check_share
from kurtail_gguf.convert.by_itself.loading import upstreams_architectures
from kurtail_gguf.messages.errors import UnsupportedArchitecture
from kurtail_gguf.model.by_itself import find_layers, text_architecture
from kurtail_gguf.model.families.registry import WRAPPERS, has_entry

#: What default configurations lack without which transformers makes no model, or none that runs.
_LACKING: dict[str, dict[str, Any]] = {
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 6},
    "Lfm2MoeForCausalLM": {"layer_types": [*["conv", "conv", "full_attention"] * 10, "conv", "conv"]},
}
OWN, BY_ITSELF, REFUSED = "own entry", "by itself", "refused"


#: What the proof or upstream's converter refuses of a tiny model, and so, by all that is known, of every other.
_DISPROVEN = {
    "BambaForCausalLM": "the proof fails: upstream's graph computes other attention than transformers",
    "BitNetForCausalLM": "upstream's converter knows another layout of it, and rounds weights to three values",
    "FalconMambaForCausalLM": "the proof fails: upstream's graph has one epsilon for all norms, transformers two",
}


@dataclass(frozen=True, slots=True)
class Way:
    """How an architecture is converted.

    Args:
        architecture: as config.json has it.
        kind: :data:`OWN`, :data:`BY_ITSELF` or :data:`REFUSED`.
        detail: what is known of it, or why it is refused.
    """

    architecture: str
    kind: str
    detail: str = ""


def ways() -> Iterator[Way]:
    """Every architecture of the pinned upstream's converter, by name."""
    return map(way_of, sorted(upstreams_architectures()))


def way_of(architecture: str) -> Way:
    """How one is converted, told from transformers' default configuration of it."""
    if has_entry(architecture):
        return Way(architecture, OWN)
    if own := sorted({family.architecture for (wrapper, _), family in WRAPPERS.items() if wrapper == architecture}):
        return Way(architecture, OWN, f"of its text: {', '.join(own)}")
    if architecture in _DISPROVEN:
        return Way(architecture, REFUSED, _DISPROVEN[architecture])
    try:
        config = _default_config(architecture)
    except UnsupportedArchitecture as error:
        return Way(architecture, REFUSED, str(error))
    try:
        found = find_layers(config)
        check_share(found, architecture)
    except UnsupportedArchitecture as error:
        return Way(architecture, REFUSED, str(error).removeprefix(f"{architecture}: ").removeprefix(f"{architecture} cannot be converted by itself: "))
    return Way(architecture, BY_ITSELF, f"{sum(one.count for one in found.linears)} linears in {found.count} layers of the default configuration")


def _default_config(architecture: str) -> Any:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    wanted = (architecture, text_architecture(architecture))
    kinds = [kind for one in wanted for kind, names in known if one in (names, *_several(names))]
    if not kinds:
        raise UnsupportedArchitecture("transformers has no model of that name that writes text, and code beside a checkpoint is not run")
    try:
        config = CONFIG_MAPPING[kinds[0]](**_LACKING.get(architecture, {}))
    except Exception as error:  # some have no defaults
        told = " ".join(f"{type(error).__name__} {error}".split())
        raise UnsupportedArchitecture(f"transformers has no default configuration of it: {told[:120]}") from error
    config.architectures = [architecture]
    return config


def _several(names: Any) -> tuple[str, ...]:
    return () if isinstance(names, str) else tuple(names)
