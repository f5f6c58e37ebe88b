"""What the runtime rounds while it computes, in torch: activations of linears, keys, values, queries.

Each function returns the values that the rounded numbers stand for. Formats are docs/format.md's and
upstream's q4_0 and q8_0 (``quantize_row_q4_0_ref``, ``quantize_row_q8_0_ref``), which follow the same
two rules with blocks of 32.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Block of activations that enter a kt4 linear.
ACTIVATION_BLOCK = 64
#: Block of upstream's q4_0 and q8_0, the cache types.
CACHE_BLOCK = 32

_HALF_MAX = 65504.0


def round_4bit(x: Tensor, block: int) -> Tensor:
    """Symmetric int4 with a signed scale: the largest magnitude of a block becomes −8.

    Args:
        x: float32 ``[..., K]``, K a multiple of ``block``.
        block: values that share a scale.

    Returns:
        float32 ``[..., K]``.
    """
    blocks = _blocks(x, block)
    # argmax gives the first of equals, as the reference's loop does
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = largest / -8
    levels = blocks * _inverse(scale)
    # ties: kt4 takes the even code, upstream's q4_0 rounds up
    codes = levels.round() if block == ACTIVATION_BLOCK else torch.floor(levels + 8.5) - 8
    return (codes.clamp(max=7) * _half(scale)).reshape(x.shape)


def round_8bit(x: Tensor, block: int) -> Tensor:
    """Symmetric int8: the largest magnitude of a block becomes 127.

    Args:
        x: float32 ``[..., K]``, K a multiple of ``block``.
        block: values that share a scale.

    Returns:
        float32 ``[..., K]``.
    """
    blocks = _blocks(x, block)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    scaled = blocks * _inverse(scale)
    # ties: our activations take the even code, upstream's q8_0 rounds away from zero
    codes = scaled.round() if block == ACTIVATION_BLOCK else torch.sign(scaled) * torch.floor(scaled.abs() + 0.5)
    return (codes * _half(scale)).reshape(x.shape)


def round_to(x: Tensor, bits: int, block: int) -> Tensor:
    """Round to 4 or 8 bits in blocks, or to half precision for 16."""
    if bits == 4:
        return round_4bit(x, block)
    if bits == 8:
        return round_8bit(x, block)
    if bits == 16:
        return x.half().float()
    raise ValueError(f"{bits} bits are not offered: 4, 8 or 16")


def _blocks(x: Tensor, block: int) -> Tensor:
    return x.float().reshape(*x.shape[:-1], x.shape[-1] // block, block)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)


def _half(scale: Tensor) -> Tensor:
    return scale.clamp(-_HALF_MAX, _HALF_MAX).half().float()
