"""Random orthogonal matrices: Hadamard where one of that order is known, else Haar-distributed.

Hadamard matrices come from Paley's constructions for the odd part of the order and Sylvester's
doubling for the rest. That covers hidden sizes such as 576 = 36·16, 896 = 28·32, 3584 = 28·128 and
5120 = 20·256 without stored tables.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from kurtail_gguf.numerics.hadamard import sylvester

#: Largest order tried from Paley's constructions before Sylvester's doubling.
_MAX_PALEY = 256


def hadamard_matrix(n: int) -> npt.NDArray[np.float64] | None:
    """A Hadamard matrix of order n, or None where none is known here.

    Returns:
        float64 ``[n, n]`` of ±1 with ``H Hᵀ = n I``.
    """
    core = n
    while core % 2 == 0:
        core //= 2
    while core <= min(n, _MAX_PALEY):
        base = np.ones((1, 1)) if core == 1 else _paley(core)
        if base is not None:
            doubling = sylvester(n // core) * math.sqrt(n // core)
            return np.kron(np.rint(doubling), base)
        core *= 2
    return None


def random_orthogonal(n: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """A Haar-distributed orthogonal matrix, float64 ``[n, n]`` (Mezzadri 2007, math-ph/0609050)."""
    q, r = np.linalg.qr(rng.standard_normal((n, n)))
    # QR alone is not uniform: its signs follow the algorithm's convention.
    return q * np.sign(np.diag(r))


def random_rotation(n: int, rng: np.random.Generator) -> tuple[str, npt.NDArray[np.float64]]:
    """A random rotation as QuaRot uses it (Ashkboos et al. 2024, arXiv:2404.00456, section 3).

    Returns:
        ``("hadamard", D H / √n)`` with random signs D where a Hadamard matrix of order n is known,
        else ``("random", Q)`` with Q Haar-distributed; float64 ``[n, n]``.
    """
    matrix = hadamard_matrix(n)
    if matrix is None:
        return "random", random_orthogonal(n, rng)
    signs = rng.integers(0, 2, n) * 2.0 - 1.0
    return "hadamard", signs[:, None] * matrix / math.sqrt(n)


def _paley(n: int) -> npt.NDArray[np.float64] | None:
    """A Hadamard matrix of order n by Paley's first or second construction, for prime fields."""
    if n % 4 == 0 and _is_prime(n - 1):
        # I: q = n − 1 ≡ 3 (mod 4); the Jacobsthal matrix is antisymmetric there.
        border = _bordered(n - 1)
        border[1:, 0] = -1.0
        return border + np.eye(n)
    half = n // 2
    if n % 4 == 0 and half % 2 == 0 and _is_prime(half - 1) and (half - 1) % 4 == 1:
        # II: q = n/2 − 1 ≡ 1 (mod 4); symmetric, each entry becomes a 2 x 2 block.
        border = _bordered(half - 1)
        return np.kron(border, [[1.0, 1.0], [1.0, -1.0]]) + np.kron(np.eye(half), [[1.0, -1.0], [-1.0, -1.0]])
    return None


def _bordered(q: int) -> npt.NDArray[np.float64]:
    """``[[0, 1ᵀ], [1, Q]]`` with the Jacobsthal matrix Q of order q: Q[i, j] = χ(i − j)."""
    character = np.full(q, -1.0)
    character[[i * i % q for i in range(1, q)]] = 1.0
    character[0] = 0.0
    index = np.arange(q)
    out = np.ones((q + 1, q + 1))
    out[0, 0] = 0.0
    out[1:, 1:] = character[(index[:, None] - index[None, :]) % q]
    return out


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, math.isqrt(n) + 1))
