"""The first bytes of a safetensors file, for files that are written tensor by tensor or not at all."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping


def header(shapes: Mapping[str, tuple[int, ...]], dtype: str, size: int) -> bytes:
    """What a file of these tensors begins with; their values follow without gaps.

    Args:
        shapes: by name, in the order of the file.
        dtype: of all of them, as safetensors calls it.
        size: bytes of a value.
    """
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + size * math.prod(shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(table).encode()
    # values begin at a multiple of their size, so that the mapped file can be read as it lies
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded
