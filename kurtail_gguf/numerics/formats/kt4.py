"""Oracle of tensor type ``kt4`` (docs/format.md): pack, unpack, reference quantization, dequantize.

A block is 64 values along the row: one signed half scale ``d`` and 64 two's-complement nibbles,
34 bytes. Rounding traps, all of which must match the C reference bit for bit:

* every floating operation is single precision with one rounding;
* the largest value is the *first* with the largest magnitude, so the sign of ``d`` is fixed on ties;
* a block becomes whole numbers before its scale is searched (ties to the even one), and from there
  all is integer: a code's ties go up, and sums do not depend on the order of addition;
* of levels with equal error the first in the table wins;
* the stored scale is ``half`` of a division by the level, not of a product with the plain scale.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from kurtail_gguf.numerics.formats import nibbles

#: Type id in the file, and ``general.file_type``.
TYPE_ID: Final = 164
#: Values in a block.
BLOCK: Final = 64
#: Bytes in a block: two of scale, 32 of nibbles.
TYPE_SIZE: Final = 34
#: Largest finite half.
HALF_MAX: Final = 65504.0
#: Whole numbers to a step of the plain scale while a block's scale is searched.
UNIT: Final = 1024
#: What the search tries, in the header's order: R maps the largest value to the level −R/4.
LEVELS: Final = (32, 35, 33, 36, 34, 31, 29, 37)


def pack(codes: npt.NDArray[np.int8], scales: npt.NDArray[np.float16]) -> npt.NDArray[np.uint8]:
    """Lay codes and scales out as the file's bytes.

    Args:
        codes: int8 ``[..., K]`` in −8…7, K a multiple of 64.
        scales: float16 ``[..., K/64]``, finite.

    Returns:
        uint8 ``[..., K/64*34]``.

    Raises:
        ValueError: shapes that do not fit, a code outside −8…7, a scale that is not finite.
    """
    return nibbles.pack_rows(codes, scales, BLOCK, nibbles.TWOS_COMPLEMENT)


def unpack(data: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Inverse of :func:`pack`.

    Args:
        data: uint8 ``[..., B*34]``.

    Returns:
        codes int8 ``[..., B*64]`` and scales float16 ``[..., B]``.

    Raises:
        ValueError: a row that is not a whole number of blocks.
    """
    return nibbles.unpack_rows(data, BLOCK, nibbles.TWOS_COMPLEMENT)


def level_step(level: int) -> int:
    """A step of ``level``'s scale in whole numbers: ``32·UNIT / level``, rounded to the nearest."""
    size = (32 * UNIT + abs(level) // 2) // abs(level)
    return size if level > 0 else -size


def quantize_reference(
    x: npt.NDArray[np.floating],
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Round-to-nearest with the best of a few scales, as for activations: steps 1–4 of docs/format.md.

    Args:
        x: finite ``[..., K]``, K a multiple of 64; computed in float32.

    Returns:
        codes int8 ``[..., K]`` and scales float16 ``[..., K/64]``.
    """
    nibbles.check_row(x.shape[-1], BLOCK)
    lead, blocks = x.shape[:-1], x.shape[-1] // BLOCK
    values = np.asarray(x, np.float32).reshape(*lead, blocks, BLOCK)
    first = np.abs(values).argmax(-1)  # numpy's argmax is the first on ties
    # Adding +0 turns a block of -0 into one of +0, which is where the C reference's comparison starts.
    signed_max = np.take_along_axis(values, first[..., None], -1) + np.float32(0)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / (signed_max / np.float32(-8))
    # Infinite for a block of zeros or the tiniest denormals, whose half scale is 0: codes 0 as well.
    inverse = np.where(np.isfinite(inverse), inverse, np.float32(0))
    whole = np.rint(values * inverse * np.float32(UNIT)).astype(np.int32).clip(-8 * UNIT, 8 * UNIT)

    candidates = np.stack([_level_codes(whole, level) for level in LEVELS])
    steps = np.array([level_step(level) for level in LEVELS]).reshape(-1, *[1] * whole.ndim)
    errors = np.square(whole - steps * candidates, dtype=np.int64).sum(-1)
    best = errors.argmin(0)
    codes = np.take_along_axis(candidates, best[None, ..., None], 0)[0]
    scales = signed_max[..., 0] / (np.array(LEVELS, np.float32) * np.float32(-0.25))[best]
    scales = np.clip(scales, -HALF_MAX, HALF_MAX).astype(np.float16)
    return codes.astype(np.int8).reshape(*lead, blocks * BLOCK), scales


def _level_codes(whole: npt.NDArray[np.int32], level: int) -> npt.NDArray[np.int32]:
    return np.clip((whole * level + (1 << 14)) >> 15, -8, 7)


def dequantize(codes: npt.NDArray[np.int8], scales: npt.NDArray[np.float16]) -> npt.NDArray[np.float32]:
    """``x[i] = d · q[i]`` in single precision.

    Args:
        codes: int8 ``[..., K]``.
        scales: float16 ``[..., K/64]``.

    Returns:
        float32 ``[..., K]``.
    """
    return nibbles.scale_rows(codes, scales, BLOCK)
