"""GGUF files in and out: the only place that knows ``gguf`` and upstream's converter.

Both run in workers (:mod:`kurtail_gguf.runtime.vendored`); this module is the face of them that the rest of
the program sees.
"""

from __future__ import annotations

from kurtail_gguf.runtime.export.writer import (
    ExportError,
    Header,
    export_reference,
    no_tokenizer,
    read_header,
    start_converter,
    write_adapter,
    write_by_itself,
    write_gguf,
)  # fmt: skip
from kurtail_gguf.runtime.gguf_info import GgufError, GgufInfo, TensorInfo, read_gguf

__all__ = [
    "ExportError",
    "GgufError",
    "GgufInfo",
    "TensorInfo",
    "Header",
    "export_reference",
    "no_tokenizer",
    "read_gguf",
    "read_header",
    "start_converter",
    "write_adapter",
    "write_by_itself",
    "write_gguf",
]
