"""Which type keys and values are cached in while a file is measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

#: What the file asks for, f16 where it asks for nothing: the cache that whoever runs the file gets.
FILE = "file"
#: Types that can be asked for instead, for keys and values alike; bits of a value, its scale not counted.
CACHE_BITS: Mapping[str, int] = MappingProxyType({"f16": 16, "q8_0": 8, "q4_0": 4})
CACHE_TYPES = (FILE, *CACHE_BITS)
#: What other caches are compared with.
F16 = "f16"


def cache_arguments(cache: str) -> list[str]:
    """Options of llama.cpp's programs for one of :data:`CACHE_TYPES`."""
    return [] if cache == FILE else ["-ctk", cache, "-ctv", cache]


def with_cache(name: str, cache: str | None) -> str:
    """A file's name with the cache type it was measured with; None where no type was chosen."""
    return name if cache is None else f"{name} (cache {cache})"


def stage_name(what: str, model: Path, cache: str) -> str:
    """Name of a progress stage: ``perplexity of out.gguf (cache q8_0)``."""
    return f"{what} of {with_cache(model.name, None if cache == FILE else cache)}"
