"""Writes a GGUF file once more with other keys and transformed tensors: run by test_online.py with the pinned ``gguf``.

    rewritten_file.py SOURCE TARGET < CHANGES

CHANGES is JSON. ``keys``: name to [type of gguf.GGUFValueType, value], or to null for a key to drop. ``transformed``: name
of an f32 tensor to n; its rows are multiplied by the normalised Hadamard matrix in pieces of n.
"""

from __future__ import annotations

import json
import sys

import gguf
import numpy as np
from scipy.linalg import hadamard


def main(source: str, target: str) -> None:
    changes = json.load(sys.stdin)
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture" and name not in changes["keys"]:
            element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=element)
    for name, change in changes["keys"].items():
        if change is not None and isinstance(change[1], list):
            writer.add_key_value(name, change[1], gguf.GGUFValueType.ARRAY, sub_type=gguf.GGUFValueType[change[0]])
        elif change is not None:
            writer.add_key_value(name, change[1], gguf.GGUFValueType[change[0]])
    for tensor in reader.tensors:
        data = tensor.data
        if n := changes["transformed"].get(tensor.name):
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
            data = (data.astype(np.float64).reshape(-1, n) @ hadamard(n) / n**0.5).astype(np.float32).reshape(data.shape)
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


main(*sys.argv[1:])
