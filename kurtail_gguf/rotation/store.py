"""Rotations as one value: kinds, matrices and sizes, and their file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

from kurtail_gguf.errors import KurtailError
from kurtail_gguf.files import replacing


#: Arrays of :class:`Rotations`, as its file names them.
_ARRAYS = ("r1", "r2", "ffn_scales", "key_scales", "key_offsets")


@dataclass(frozen=True, eq=False)
class Rotations:
    """R1 and R2, with the kinds that docs/format.md names.

    Args:
        r1_kind, r2_kind: ``none``, ``hadamard``, ``random`` or ``learned``.
        r1: float64 ``[hidden, hidden]``, None with kind ``none``.
        r2: float64 ``[layers, kv_heads, head_dim, head_dim]``, None with kind ``none``.
        ffn_scales: float64 ``[layers, intermediate]``, what up_proj's outputs are multiplied and down_proj's columns
            divided by; None leaves them.
        key_scales: float64 ``[layers, kv_heads, head_dim]``, what keys are divided and their queries multiplied by, the same
            for both values of a RoPE pair; None leaves them.
        key_offsets: float32 of the same shape, what keys are stored without in the cache; None for nothing. Not folded.
    """

    r1_kind: str = "none"
    r2_kind: str = "none"
    r1: npt.NDArray[np.float64] | None = None
    r2: npt.NDArray[np.float64] | None = None
    ffn_scales: npt.NDArray[np.float64] | None = None
    key_scales: npt.NDArray[np.float64] | None = None
    key_offsets: npt.NDArray[np.float32] | None = None

    def sha256(self, r4: int) -> str:
        """Hex digest of everything that is folded beside the norm gains, R4's size included, and of what keys lack.

        It says which adapters and which saved states fit a file (``kurtail.rotations.sha256``).
        """
        digest = hashlib.sha256(f"r4 {r4}\n".encode())
        folded = {name: getattr(self, name) for name in _ARRAYS}
        for name, value in folded.items():
            if value is not None:
                digest.update(f"{name} {value.shape}\n".encode())
                digest.update(np.ascontiguousarray(value, "<f8").tobytes())
        return digest.hexdigest()


def save_rotations(rotations: Rotations, path: Path) -> None:
    """Write ``path`` (safetensors, kinds in its metadata) atomically."""
    tensors = {name: getattr(rotations, name) for name in _ARRAYS}
    kinds = {"r1": rotations.r1_kind, "r2": rotations.r2_kind}
    content = {name: np.ascontiguousarray(value) for name, value in tensors.items() if value is not None}
    with replacing(path) as scratch:
        save_file(content, scratch, {"kinds": json.dumps(kinds)})


def load_rotations(path: Path) -> Rotations:
    """Inverse of :func:`save_rotations`.

    Raises:
        KurtailError: the file is damaged.
    """
    try:
        with safe_open(path, framework="np") as file:
            kinds = json.loads(file.metadata()["kinds"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        return Rotations(kinds["r1"], kinds["r2"], **{name: tensors.get(name) for name in _ARRAYS})
    except Exception as error:  # safetensors' own errors, JSON's, a missing key: all the same to a user
        raise KurtailError(f"{path} is damaged ({error}): remove the work directory") from error
