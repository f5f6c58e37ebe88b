"""Worker of :func:`kurtail_gguf.runtime.gguf_info.read_gguf`: upstream's GGUFReader, answers in JSON."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np

from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.runtime import vendored

#: Longer arrays are vocabularies, but for our own: only their length and hash are of use.
_LONGEST_ARRAY = 4096


def read(request: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Read the file named ``path``; the answer is what GgufInfo and TensorInfo are built from."""
    vendored.assert_vendored(gguf)
    reader = _open(request["path"])
    metadata = {name: _value(name, field) for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = [
        {
            "name": tensor.name,
            "type_id": int(tensor.tensor_type),
            # ggml prints q6_K and the like with a capital K
            "type_name": tensor.tensor_type.name.lower().replace("_k", "_K"),
            "shape": [int(length) for length in reversed(tensor.shape.tolist())],
            "bytes": int(tensor.n_bytes),
            "offset": int(tensor.data_offset),
        }
        for tensor in reader.tensors
    ]
    return {"metadata": metadata, "tensors": tensors}


class _Reader(gguf.GGUFReader):
    """A vocabulary is hundreds of thousands of slices, and those of a memory map cost four times those of an array over it."""

    def _get(self, *arguments: Any, **options: Any) -> Any:
        if isinstance(self.data, np.memmap):
            self.data = np.asarray(self.data)
        return super()._get(*arguments, **options)


def _open(path: str) -> gguf.GGUFReader:
    # GGUFReader indexes and reshapes the mapped bytes without checks of its own: what a truncated or
    # damaged file raises is whatever numpy or an enum raises first.
    try:
        return _Reader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, TypeError) as error:
        text = str(error)
        if "is not a valid GGMLQuantizationType" in text:
            raise KurtailError(f"contains a tensor of type {text.split()[0]}, which this version does not support") from None
        raise KurtailError(f"is truncated or damaged ({type(error).__name__}: {text})") from None


def _value(name: str, field: gguf.gguf_reader.ReaderField) -> Any:
    if not name.startswith("kurtail.") and field.types and field.types[0] == gguf.GGUFValueType.ARRAY and len(field.data) > _LONGEST_ARRAY:
        digest = hashlib.sha256()
        for index in field.data:
            part = field.parts[index].tobytes()
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return {"length": len(field.data), "sha256": digest.hexdigest()}
    return field.contents()


if __name__ == "__main__":
    vendored.serve(read)
