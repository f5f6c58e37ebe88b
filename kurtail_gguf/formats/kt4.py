"""Oracle of tensor type ``kt4`` (docs/format.md): pack, unpack, reference quantization, dequantize.

A block is 64 values along the row: one signed half scale ``d`` and 64 two's-complement nibbles,
34 bytes. Rounding traps, all of which must match the C reference bit for bit:

* every operation is single precision with one rounding, and ties of ``x·id`` go to the even code;
* ``id = 1 / d`` uses the unrounded ``d``, while the stored scale is ``half(d)``;
* the largest value is the *first* with the largest magnitude, so the sign of ``d`` is fixed on ties.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from kurtail_gguf.formats import nibbles

#: Type id in the file, and ``general.file_type``.
TYPE_ID: Final = 164
#: Values in a block.
BLOCK: Final = 64
#: Bytes in a block: two of scale, 32 of nibbles.
TYPE_SIZE: Final = 34
#: Largest finite half.
HALF_MAX: Final = 65504.0


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


def quantize_reference(
    x: npt.NDArray[np.floating],
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Plain round-to-nearest as the runtime quantizes activations: steps 1–3 of docs/format.md.

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
    d = signed_max / np.float32(-8)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / d
    # Infinite for a block of zeros or the tiniest denormals, whose half scale is 0: codes 0 as well.
    inverse = np.where(np.isfinite(inverse), inverse, np.float32(0))
    codes = np.minimum(np.rint(values * inverse), np.float32(7))
    scales = np.clip(d, -HALF_MAX, HALF_MAX).astype(np.float16)[..., 0]
    return codes.astype(np.int8).reshape(*lead, blocks * BLOCK), scales


def dequantize(codes: npt.NDArray[np.int8], scales: npt.NDArray[np.float16]) -> npt.NDArray[np.float32]:
    """``x[i] = d · q[i]`` in single precision.

    Args:
        codes: int8 ``[..., K]``.
        scales: float16 ``[..., K/64]``.

    Returns:
        float32 ``[..., K]``.
    """
    return nibbles.scale_rows(codes, scales, BLOCK)
