"""Everything that is done to a model's activations so that rounding loses little, as one value, and its file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from kurtail_gguf.files.atomic import replacing
from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.method.fold.layer import LayerTransforms

#: Arrays of :class:`Transforms`, as its file names them; beside them are the diagonals, by site.
_ARRAYS = ("r1", "r2", "key_scales", "key_offsets")
_SCALE = "scale of "


@dataclass(frozen=True, eq=False)
class Transforms:
    """R1 and R2, with the kinds that docs/format.md names, and what is done site by site.

    Args:
        r1_kind, r2_kind: ``none``, ``hadamard``, ``random`` or ``learned``.
        r1: float64 ``[hidden, hidden]``, None with kind ``none``.
        r2: float64 ``[layers, kv_heads, head_dim, head_dim]``, None with kind ``none``.
        scales: by a site's name for it (``Site.diagonal``), what its channels are multiplied and its readers' columns divided by
            in each layer, float64 ``[layers, Site.scale_size]``, of experts ``[layers, experts, Site.scale_size]``; ones in
            layers without such a site.
        online: by the kind of a site, size of the Hadamard blocks that the runtime multiplies it by.
        key_scales: float64 ``[layers, kv_heads, head_dim]``, what keys are divided and their queries multiplied by, the same
            for both values of a RoPE pair; None leaves them.
        key_offsets: float32 of the same shape, what keys are stored without in the cache; None for nothing. Not folded.
    """

    r1_kind: str = "none"
    r2_kind: str = "none"
    r1: npt.NDArray[np.float64] | None = None
    r2: npt.NDArray[np.float64] | None = None
    scales: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    online: Mapping[str, int] = field(default_factory=dict)
    key_scales: npt.NDArray[np.float64] | None = None
    key_offsets: npt.NDArray[np.float32] | None = None

    def sha256(self) -> str:
        """Hex digest of everything that is folded beside the norm gains, and of what keys lack.

        It says which adapters and which saved states fit a file (``kurtail.rotations.sha256``).
        """
        online = ", ".join(f"{kind} {size}" for kind, size in sorted(self.online.items()))
        digest = hashlib.sha256(f"online {online}\n".encode())
        for name, value in self._arrays().items():
            digest.update(f"{name} {value.shape}\n".encode())
            digest.update(np.ascontiguousarray(value, "<f8").tobytes())
        return digest.hexdigest()

    def layer(self, number: int, r1: torch.Tensor | None, device: torch.device) -> LayerTransforms:
        """A layer's share, on a device where ``r1`` is already (:meth:`r1_on`): it is too large to be sent for each layer."""

        def share(values: npt.NDArray | None) -> torch.Tensor | None:
            return None if values is None else torch.from_numpy(values[number]).to(device)

        scales = {kind: torch.from_numpy(values[number]).to(device) for kind, values in self.scales.items()}
        return LayerTransforms(r1, share(self.r2), self.online, scales, share(self.key_scales))

    def r1_on(self, device: torch.device) -> torch.Tensor | None:
        """R1, float64 ``[hidden, hidden]``, on a device."""
        return None if self.r1 is None else torch.from_numpy(self.r1).to(device)

    def _arrays(self) -> dict[str, npt.NDArray]:
        found = {name: getattr(self, name) for name in _ARRAYS} | {_SCALE + kind: self.scales[kind] for kind in sorted(self.scales)}
        return {name: value for name, value in found.items() if value is not None}

    def save(self, path: Path) -> None:
        """Write ``path`` (safetensors, the rest in its metadata) atomically."""
        settings = {"r1": self.r1_kind, "r2": self.r2_kind, "online": dict(self.online)}
        content = {name: np.ascontiguousarray(value) for name, value in self._arrays().items()}
        with replacing(path) as scratch:
            save_file(content, scratch, {"transforms": json.dumps(settings)})


def load_transforms(path: Path) -> Transforms:
    """Inverse of :meth:`Transforms.save`.

    Raises:
        KurtailError: the file is damaged.
    """
    try:
        with safe_open(path, framework="np") as file:
            settings = json.loads(file.metadata()["transforms"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        arrays = {name: tensors.get(name) for name in _ARRAYS}
        scales = {name.removeprefix(_SCALE): value for name, value in tensors.items() if name.startswith(_SCALE)}
        return Transforms(settings["r1"], settings["r2"], scales=scales, online=settings["online"], **arrays)
    except Exception as error:  # safetensors' own errors, JSON's, a missing key: all the same to a user
        raise KurtailError(f"{path} is damaged ({error}): remove the work directory") from error
