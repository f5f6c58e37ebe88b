"""The Hadamard matrices the file format speaks of: normalised Sylvester matrices and their fast product.

``H_1 = [1]``, ``H_2n = [[H_n, H_n], [H_n, -H_n]] / √2``: symmetric, orthogonal, its own inverse, in
natural order. R3 and R4 of docs/format.md are these, so the converter and any simulation share them.
"""

from __future__ import annotations

import math
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

#: Largest block of R4 that is chosen where the method wants it as large as can be. The runtime does up to 8192, but keeps the matrix for backends without
#: the fast transform: 16 MB at 2048, 256 MB at 8192; outliers are spread 45-fold or 90-fold.
MAX_R4: Final = 2048

#: A numpy array or a torch tensor: only arithmetic, reshape and slices are used.
Array = TypeVar("Array")


def hadamard_size(size: int, limit: int = MAX_R4) -> int:
    """Size of one Hadamard block of an input: the largest power of two that divides its length, up to a limit.

    Args:
        size: length of the input (with the default limit 1536 gives 512, 14336 gives 2048).
        limit: a power of two.

    Returns:
        A power of two; 1 where the length is odd (there is nothing to transform then).
    """
    return min(size & -size, limit)


def sylvester(n: int) -> npt.NDArray[np.float64]:
    """The normalised Sylvester matrix H_n, float64 ``[n, n]``, n a power of two."""
    if n < 1 or n & (n - 1):
        raise ValueError(f"Sylvester matrices exist for powers of two, not {n}")
    return walsh_hadamard_(np.eye(n), n)


def walsh_hadamard_(x: Array, n: int) -> Array:
    """Multiply each of the ``K/n`` consecutive pieces of every row by H_n, in place.

    Args:
        x: contiguous floating ``[..., K]`` array or tensor, overwritten; K a multiple of n.
        n: size of a piece, a power of two.

    Returns:
        ``x``, after K·log2(n) additions a row and one scaling.
    """
    if n < 1 or n & (n - 1) or x.shape[-1] % n:
        raise ValueError(f"pieces of {n} do not divide a row of {x.shape[-1]} as a power of two")
    half = 1
    while half < n:
        pairs = x.reshape(-1, 2, half)
        even, odd = pairs[:, 0], pairs[:, 1]
        difference = even - odd
        even += odd
        odd[...] = difference
        half *= 2
    x *= 1.0 / math.sqrt(n)
    return x
