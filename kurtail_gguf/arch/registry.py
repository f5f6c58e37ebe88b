"""The supported architectures by name."""

from __future__ import annotations

from kurtail_gguf.arch import llama, mistral, qwen2
from kurtail_gguf.arch.spec import Family
from kurtail_gguf.errors import UnsupportedArchitecture

FAMILIES: dict[str, Family] = {
    module.FAMILY.architecture: module.FAMILY for module in (llama, mistral, qwen2)
}


def find_family(architecture: str) -> Family:
    """The family of a config's ``architectures`` entry.

    Raises:
        UnsupportedArchitecture: with the list of those that are supported.
    """
    try:
        return FAMILIES[architecture]
    except KeyError:
        supported = ", ".join(sorted(FAMILIES))
        raise UnsupportedArchitecture(
            f"architecture {architecture} is not supported; supported: {supported}"
        ) from None
