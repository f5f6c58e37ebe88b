"""The order of the two values of a RoPE pair in a head."""

from __future__ import annotations

import torch
from torch import Tensor

from kurtail_gguf.model.spec import ModelSpec


def in_halves(heads: Tensor, spec: ModelSpec) -> Tensor:
    """``[…, head_dim]`` in the checkpoint's order, to the first values of all pairs before the second ones."""
    return _reordered(heads, spec, (-1, 2))


def from_halves(heads: Tensor, spec: ModelSpec) -> Tensor:
    """The inverse of :func:`in_halves`."""
    return _reordered(heads, spec, (2, -1))


def _reordered(heads: Tensor, spec: ModelSpec, shape: tuple[int, int]) -> Tensor:
    if not spec.family.interleaved:
        return heads
    turned = heads[..., : spec.rotary_dim].unflatten(-1, shape).mT.flatten(-2)
    return torch.cat([turned, heads[..., spec.rotary_dim :]], -1)
