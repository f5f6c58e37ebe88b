"""What the runtime rounds while it computes, in torch: activations of linears, keys, values, queries.

Each function returns the values that the rounded numbers stand for. Formats are docs/format.md's (blocks
of 64) and upstream's q4_0 and q8_0 (``quantize_row_q4_0_ref``, ``quantize_row_q8_0_ref``; blocks of 32).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kurtail_gguf.numerics.formats.kt4 import LEVELS, UNIT, level_step

#: Block of activations that enter a kt4 linear.
ACTIVATION_BLOCK = 64
#: Block of upstream's q4_0 and q8_0, the cache types.
CACHE_BLOCK = 32

_HALF_MAX = 65504.0

#: Blocks searched at a time on a CPU: its temporaries stay in the cache, which is twice as fast.
_CHUNK = 4096


def round_4bit(x: Tensor, block: int) -> Tensor:
    """Symmetric int4 with a signed scale: the largest magnitude of a block becomes −8, as q4_0 has it,
    or with blocks of 64 whichever of a few levels loses least, as docs/format.md has it.

    Args:
        x: float32 ``[..., K]``, K a multiple of ``block``.
        block: values that share a scale.

    Returns:
        float32 ``[..., K]``; with blocks of 64 no gradient passes.
    """
    blocks = _blocks(x, block)
    if block == ACTIVATION_BLOCK:
        flat = blocks.reshape(-1, block)
        parts = flat.split(_CHUNK) if flat.device.type == "cpu" else (flat,)
        return torch.cat([_searched(part) for part in parts]).reshape(x.shape)
    largest = _signed_max(blocks)
    scale = largest / -8
    codes = torch.floor(blocks * _inverse(scale) + 8.5) - 8  # ties go up
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
    raise ValueError(f"{bits} bits are not supported: give 4, 8 or 16")


def _blocks(x: Tensor, block: int) -> Tensor:
    return x.float().reshape(*x.shape[:-1], x.shape[-1] // block, block)


def _signed_max(blocks: Tensor) -> Tensor:
    # argmax gives the first of equals, as the reference's loop does
    return blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))


@torch.no_grad()
def _searched(blocks: Tensor) -> Tensor:
    """Blocks ``[n, 64]`` under the best of ``LEVELS``: quantize_reference of ``formats.kt4``, bit for bit.

    Its integers are floats here, for speed: products and squares stay below 2^24 (that is what the
    limits on ``LEVELS`` are for) and sums are double, so nothing is rounded.
    """
    largest = _signed_max(blocks)
    whole = (blocks * _inverse(largest / -8)).mul_(UNIT).round_()
    scratch = torch.empty_like(whole)
    best_error, best_level = None, torch.full_like(largest, LEVELS[0])
    for level in LEVELS:
        codes = _level_codes(whole, level, scratch)
        error = torch.sub(whole, codes, alpha=level_step(level), out=scratch).square_()
        error = error.sum(-1, keepdim=True, dtype=torch.float64)
        if best_error is None:
            best_error = error
        else:
            best_level.masked_fill_(error < best_error, level)
            best_error = torch.minimum(error, best_error)
    codes = _level_codes(whole, best_level, scratch)
    return codes * _half(largest / (best_level * -0.25))


def _level_codes(whole: Tensor, level: int | Tensor, out: Tensor) -> Tensor:
    return torch.mul(whole, level / (32 * UNIT), out=out).add_(0.5).floor_().clamp_(-8, 7)


def _inverse(scale: Tensor) -> Tensor:
    inverse = 1 / scale
    return torch.where(inverse.isinf(), torch.zeros_like(scale), inverse)


def _half(scale: Tensor) -> Tensor:
    return scale.clamp(-_HALF_MAX, _HALF_MAX).half().float()
