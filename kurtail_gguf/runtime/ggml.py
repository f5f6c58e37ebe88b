"""Row-wise conversion to and from ggml's block types, by the runtime's own code.

Types that exist upstream are quantized by ``libggml-base`` itself and not by a copy of its
arithmetic, so the embedding and the output of our files are bit for bit what ``llama-quantize``
writes. Only row functions are used; no graph, no backend, no memory of ggml's own.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.runtime import native

# enum ggml_type, ggml/include/ggml.h of the pinned source. Numbers are part of the file format.
F32 = 0
F16 = 1
Q4_0 = 2
Q8_0 = 8
Q6_K = 14
BF16 = 30
KT4 = 164

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _TypeTraits(ctypes.Structure):
    """``struct ggml_type_traits`` of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _TO_FLOAT),
        ("from_float_ref", ctypes.c_void_p),
    )


class GgmlBase:
    """``libggml-base``, opened.

    Args:
        path: the library; the installed one if None.
    """

    def __init__(self, path: Path | None = None) -> None:
        path = native.library("ggml-base") if path is None else path
        try:
            lib = ctypes.CDLL(str(path))
        except OSError as error:
            raise KurtailError(f"cannot open {path}: {error}: {native.REMEDY}") from None
        self._quantize_chunk = lib.ggml_quantize_chunk
        self._quantize_chunk.restype = ctypes.c_size_t
        self._quantize_chunk.argtypes = (
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
            ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
        )  # fmt: skip
        self._type_traits = lib.ggml_get_type_traits
        self._type_traits.restype = ctypes.POINTER(_TypeTraits)
        self._type_traits.argtypes = (ctypes.c_int,)

    def row_bytes(self, ggml_type: int, width: int) -> int:
        """Bytes of one row of ``width`` values; raises KurtailError where blocks do not divide it."""
        traits = self._type_traits(ggml_type).contents
        if width % traits.blck_size:
            name = traits.type_name.decode()
            raise KurtailError(f"a row of {width} values is not a multiple of {name}'s block of {traits.blck_size}")
        return width // traits.blck_size * traits.type_size

    def quantize(self, rows: Floats, ggml_type: int) -> Bytes:
        """Quantize as ``llama-quantize`` does without an importance matrix.

        Args:
            rows: float32 ``[n, width]``.
            ggml_type: a ``GGML_TYPE_*`` number.

        Returns:
            uint8 ``[n, row_bytes]``.
        """
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        count, width = rows.shape
        packed = np.empty((count, self.row_bytes(ggml_type, width)), dtype=np.uint8)
        written = self._quantize_chunk(ggml_type, rows.ctypes.data, packed.ctypes.data, 0, count, width, None)
        if written != packed.nbytes:
            raise KurtailError(f"ggml wrote {written} bytes for {rows.shape} of type {ggml_type}, not {packed.nbytes}")
        return packed

    def dequantize(self, packed: Bytes, ggml_type: int, width: int) -> Floats:
        """The values that ggml reads from quantized rows.

        Args:
            packed: uint8 ``[n, row_bytes]``.
            ggml_type: a quantized ``GGML_TYPE_*`` number, or F16 or BF16.
            width: values in a row.

        Returns:
            float32 ``[n, width]``.
        """
        packed = np.ascontiguousarray(packed)
        expected = self.row_bytes(ggml_type, width)
        if packed.ndim != 2 or packed.shape[1] != expected:
            raise KurtailError(f"rows of type {ggml_type} and width {width} have {expected} bytes, not {packed.shape}")
        traits = self._type_traits(ggml_type).contents
        if not traits.to_float:
            raise KurtailError(f"values of type {traits.type_name.decode()} are no weights")
        rows = np.empty((packed.shape[0], width), dtype=np.float32)
        traits.to_float(packed.ctypes.data, rows.ctypes.data, rows.size)
        return rows
