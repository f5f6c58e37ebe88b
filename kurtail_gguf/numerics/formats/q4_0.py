"""Oracle of upstream's tensor type ``q4_0``: pack, unpack, dequantize (``block_q4_0`` of ggml-common.h).

A block is 32 values along the row: one signed half scale ``d`` and 32 nibbles that hold code + 8, 18
bytes. It is what block linears become for stock llama.cpp. Only the layout is upstream's: codes and
scales come from our own search, not from ``quantize_row_q4_0_ref``.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from kurtail_gguf.numerics.formats import nibbles

#: Type id in the file, and ``general.file_type``: upstream has the same number for both.
TYPE_ID: Final = 2
#: Values in a block.
BLOCK: Final = 32
#: Bytes in a block: two of scale, 16 of nibbles.
TYPE_SIZE: Final = 18


def pack(codes: npt.NDArray[np.int8], scales: npt.NDArray[np.float16]) -> npt.NDArray[np.uint8]:
    """Lay codes and scales out as the file's bytes.

    Args:
        codes: int8 ``[..., K]`` in −8…7, K a multiple of 32.
        scales: float16 ``[..., K/32]``, finite.

    Returns:
        uint8 ``[..., K/32*18]``.

    Raises:
        ValueError: shapes that do not fit, a code outside −8…7, a scale that is not finite.
    """
    return nibbles.pack_rows(codes, scales, BLOCK, nibbles.OFFSET_8)


def unpack(data: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Inverse of :func:`pack`: uint8 ``[..., B*18]`` to codes int8 ``[..., B*32]`` and scales float16 ``[..., B]``.

    Raises:
        ValueError: a row that is not a whole number of blocks.
    """
    return nibbles.unpack_rows(data, BLOCK, nibbles.OFFSET_8)


def dequantize(codes: npt.NDArray[np.int8], scales: npt.NDArray[np.float16]) -> npt.NDArray[np.float32]:
    """``x[i] = d · q[i]`` in single precision: int8 ``[..., K]``, float16 ``[..., K/32]`` to float32 ``[..., K]``."""
    return nibbles.scale_rows(codes, scales, BLOCK)
