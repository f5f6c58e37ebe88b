"""Our keys, as upstream's writer takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gguf

from kurtail_gguf.runtime.gguf_info import HADAMARD, ONLINE_KIND, ONLINE_NAME, ONLINE_SIZE, PROVENANCE_KEYS


def add_provenance(writer: gguf.GGUFWriter, provenance: Mapping[str, Any]) -> None:
    """The keys of docs/format.md that are fields of the provenance; what is not known is left out."""
    for field, key, kind in PROVENANCE_KEYS:
        add_key(writer, key, provenance[field], kind)


def add_online(writer: gguf.GGUFWriter, online: Mapping[str, int]) -> None:
    """Sizes of the blocks that inputs are transformed by, by the tensors that read them; nothing for none."""
    if online:
        add_key(writer, ONLINE_NAME, list(online), "string[]")
        add_key(writer, ONLINE_KIND, [HADAMARD] * len(online), "string[]")
        add_key(writer, ONLINE_SIZE, list(online.values()), "uint32[]")


def add_key(writer: gguf.GGUFWriter, key: str, value: Any, kind: str) -> None:
    """A key of a kind as ``PROVENANCE_KEYS`` has it; nothing for None."""
    element = gguf.GGUFValueType[kind.removesuffix("[]").upper()]
    if value is None:
        return  # not known
    if kind.endswith("[]"):
        writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, element)
    else:
        # not add_string and so on: those leave out empty strings
        writer.add_key_value(key, value, element)
