"""What a family's norms compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class NormForm:
    """x̂ g + b, where x̂ = x / √(mean x² + ε); all norms of a family have one form.

    Args:
        centred: LayerNorm: x is without its mean before that.
        offset: g is the checkpoint's weight plus this; the file has g itself.
        biased: whether there is a b.
        eps: config key of ε.
    """

    centred: bool = False
    offset: float = 0.0
    biased: bool = False
    eps: str = "rms_norm_eps"

    def unit(self, x: Tensor, eps: float) -> Tensor:
        """x̂ of ``[…, n]``, in its own type."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    def gain(self, weight: Tensor) -> Tensor:
        """g in float64, of the checkpoint's weight ``[n]``."""
        return weight.double() + self.offset

    def weight(self, gain: Tensor) -> Tensor:
        """The inverse of :meth:`gain`."""
        return gain - self.offset

    def apply(self, x: Tensor, weights: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
        """What a norm makes of float32 ``[…, n]``.

        Args:
            x: what it reads.
            weights: tensors of a layer or of the model, on the device of ``x``.
            name: of the norm, before ``.weight`` and ``.bias``.
            eps: ε.
        """
        out = self.unit(x, eps) * self.gain(weights[f"{name}.weight"]).to(x.dtype)
        return out + weights[f"{name}.bias"].to(x.dtype) if self.biased else out
