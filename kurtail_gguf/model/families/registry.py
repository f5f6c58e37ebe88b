"""The supported architectures by name."""

from __future__ import annotations

from kurtail_gguf.messages.errors import UnsupportedArchitecture
from kurtail_gguf.model.families import granite, llama, mistral, mixtral, phi3, qwen2, qwen3, qwen3_moe, smollm3
from kurtail_gguf.model.spec import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.architecture: module.FAMILY for module in (llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, smollm3, granite, phi3)
}

#: Architectures that are asked for, and why they are not converted.
REFUSED: dict[str, str] = dict.fromkeys(
    ("Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    "its layers are not described yet: norms behind attention and FFN, a gain of 1 + weight, GELU, and two RoPE bases",
)


def find_family(architecture: str) -> Family:
    """The family of a config's ``architectures`` entry.

    Raises:
        UnsupportedArchitecture: with the list of those that are supported.
    """
    try:
        return FAMILIES[architecture]
    except KeyError:
        if architecture in REFUSED:
            raise UnsupportedArchitecture(f"architecture {architecture} is not supported: {REFUSED[architecture]}") from None
        supported = ", ".join(sorted(FAMILIES))
        raise UnsupportedArchitecture(
            f"architecture {architecture} is not supported; supported: {supported}"
        ) from None
