"""Rows of 4-bit blocks: what ``kt4`` and upstream's ``q4_0`` have in common.

A block is one little-endian half scale, then ``block / 2`` bytes; byte ``j`` holds element ``j`` in its low
nibble and element ``j + block/2`` in its high one. The formats differ in the block's length and in how a
code −8…7 becomes a nibble: two's complement, or stored +8. Adding 8 flips the top bit of the nibble, so a
mask says which it is.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

#: Nibbles are two's complement.
TWOS_COMPLEMENT: Final = 0
#: Nibbles are codes + 8.
OFFSET_8: Final = 0x8

_SCALE_BYTES = 2


def check_row(length: int, block: int) -> None:
    """Raise ValueError where blocks do not divide a row."""
    if length % block:
        raise ValueError(f"row of {length} values is not a multiple of {block}")


def pack_rows(
    codes: npt.NDArray[np.int8], scales: npt.NDArray[np.float16], block: int, flipped: int
) -> npt.NDArray[np.uint8]:
    """Lay codes and scales out as a file's bytes.

    Args:
        codes: int8 ``[..., K]`` in −8…7, K a multiple of ``block``.
        scales: float16 ``[..., K/block]``, finite.
        block: values that share a scale.
        flipped: ``TWOS_COMPLEMENT`` or ``OFFSET_8``.

    Returns:
        uint8 ``[..., K/block * (2 + block/2)]``.

    Raises:
        ValueError: shapes that do not fit, a code outside −8…7, a scale that is not finite.
    """
    check_row(codes.shape[-1], block)
    lead, blocks, half = codes.shape[:-1], codes.shape[-1] // block, block // 2
    if scales.shape != (*lead, blocks):
        raise ValueError(f"scales {scales.shape} do not fit codes {codes.shape}")
    if codes.dtype != np.int8 or scales.dtype != np.float16:
        raise ValueError(f"codes {codes.dtype} and scales {scales.dtype}: expected int8 and float16")
    if codes.size and (codes.min() < -8 or codes.max() > 7):
        raise ValueError(f"codes {codes.min()}…{codes.max()} are outside -8…7")
    if not np.isfinite(scales).all():
        raise ValueError("a scale is NaN or infinite")
    levels = codes.reshape(*lead, blocks, block).view(np.uint8)
    levels = (levels & 0x0F) ^ flipped
    out = np.empty((*lead, blocks, _SCALE_BYTES + half), np.uint8)
    out[..., :_SCALE_BYTES] = scales.astype("<f2").reshape(*lead, blocks, 1).view(np.uint8)
    out[..., _SCALE_BYTES:] = levels[..., :half] | (levels[..., half:] << 4)
    return out.reshape(*lead, blocks * (_SCALE_BYTES + half))


def unpack_rows(
    data: npt.NDArray[np.uint8], block: int, flipped: int
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Inverse of :func:`pack_rows`.

    Args:
        data: uint8 ``[..., B * (2 + block/2)]``.
        block, flipped: as there.

    Returns:
        codes int8 ``[..., B*block]`` and scales float16 ``[..., B]``.

    Raises:
        ValueError: a row that is not a whole number of blocks.
    """
    half = block // 2
    size = _SCALE_BYTES + half
    if data.shape[-1] % size:
        raise ValueError(f"row of {data.shape[-1]} bytes is not a multiple of {size}")
    lead, blocks = data.shape[:-1], data.shape[-1] // size
    cells = data.reshape(*lead, blocks, size)
    scales = np.ascontiguousarray(cells[..., :_SCALE_BYTES]).view("<f2").reshape(*lead, blocks).astype(np.float16)
    pairs = np.ascontiguousarray(cells[..., _SCALE_BYTES:]) ^ np.uint8(flipped * 0x11)
    codes = np.empty((*lead, blocks, block), np.int8)
    # Shift left, then arithmetic shift right: sign extension of a nibble.
    codes[..., :half] = (pairs << 4).view(np.int8) >> 4
    codes[..., half:] = pairs.view(np.int8) >> 4
    return codes.reshape(*lead, blocks * block), scales


def scale_rows(
    codes: npt.NDArray[np.int8], scales: npt.NDArray[np.float16], block: int
) -> npt.NDArray[np.float32]:
    """``x[i] = d · q[i]`` in single precision.

    Args:
        codes: int8 ``[..., K]``.
        scales: float16 ``[..., K/block]``.
        block: values that share a scale.

    Returns:
        float32 ``[..., K]``.
    """
    check_row(codes.shape[-1], block)
    lead, blocks = codes.shape[:-1], codes.shape[-1] // block
    values = codes.reshape(*lead, blocks, block).astype(np.float32)
    return (values * scales.astype(np.float32)[..., None]).reshape(codes.shape)
