"""The supported architectures by name."""

from __future__ import annotations

from kurtail_gguf.messages.errors import UnsupportedArchitecture
from kurtail_gguf.model.families import (
    cohere2,
    dots1,
    ernie4_5,
    ernie4_5_moe,
    exaone4,
    gemma2,
    gemma3,
    glm4,
    glm4_moe,
    granite,
    granite_moe,
    granite_moe_shared,
    hunyuan_dense,
    llama,
    ministral3,
    mistral,
    mixtral,
    nemotron,
    olmo2,
    olmo3,
    olmoe,
    phi,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
)
from kurtail_gguf.model.family import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.architecture: module.FAMILY
    for module in (
        llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, smollm3, granite, phi3, gemma2, gemma3, olmo2, olmo3, seed_oss,
        exaone4, glm4, stablelm, starcoder2, phi, cohere2, ernie4_5, hunyuan_dense, nemotron, ministral3,
        qwen2_moe, olmoe, glm4_moe, ernie4_5_moe, dots1,
        granite_moe, granite_moe_shared,
    )
}  # fmt: skip

#: Architectures that are more than text and the types of their text, by the family of that.
WRAPPERS: dict[tuple[str, str], Family] = {
    (wrapper, kind): family for family in FAMILIES.values() for wrapper, kind in (family.wrappers or {}).items()
}

#: What comes before names of the text part's tensors in the checkpoint of such an architecture, and what we have instead.
TEXT_PREFIXES = (("language_model.model.", "model."), ("model.language_model.", "model."), ("language_model.lm_head.", "lm_head."))


def has_entry(architecture: str, text_type: str = "") -> bool:
    """Whether a family describes a config's ``architectures`` entry, or its text, of ``model_type`` ``text_type``."""
    return (architecture, text_type) in WRAPPERS or architecture in FAMILIES


def find_family(architecture: str, text_type: str = "") -> Family:
    """The family of a config's ``architectures`` entry; that of its text, of ``model_type`` ``text_type``, where it is more.

    Raises:
        UnsupportedArchitecture: with the list of those that are supported.
    """
    try:
        return WRAPPERS.get((architecture, text_type)) or FAMILIES[architecture]
    except KeyError:
        supported = ", ".join(sorted(FAMILIES))
        raise UnsupportedArchitecture(
            f"architecture {architecture} is not supported; supported: {supported}"
        ) from None
