"""Attention over a rounded cache, as an attention function of transformers' ``AttentionInterface``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kurtail_gguf.formats.hadamard import walsh_hadamard_
from kurtail_gguf.simulation.rounding import CACHE_BLOCK
from kurtail_gguf.simulation.straight_through import round_through

_NAME = "kurtail_simulation"

#: The runtime rotates V by this size wherever R2 is not folded in (llama-kv-cache.cpp).
V_ROTATION = 64


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """What attention does to queries, keys and values.

    Args:
        bits: of the cache, 4, 8 or 16.
        rotation: size of R3 on q and k, 0 for none.
        rotate_v: whether the runtime rotates V and the result back.
        paired: whether the runtime's q and k are in RoPE pairs rather than halves.
    """

    bits: int
    rotation: int
    rotate_v: bool
    paired: bool


def use_simulated_attention() -> str:
    """The name to give as ``attn_implementation``; ``hooks.round_cache`` tells every layer what to round."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, simulated_attention)
    return _NAME


def simulated_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention over a rounded cache, as llama.cpp's CPU flash attention computes it.

    Args:
        module: the attention layer; carries its CacheSettings as ``kurtail_cache``.
        query: ``[batch, heads, tokens, head_dim]``, after RoPE; key and value with the KV heads.
        attention_mask: unused: chunks are whole and start empty, so causality is all there is.
        scaling: of the scores.

    Returns:
        ``[batch, tokens, heads, head_dim]``, and no attention weights.
    """
    cache: CacheSettings = module.kurtail_cache
    if cache.bits < 16:
        if cache.paired:
            query, key = _halves_to_pairs(query), _halves_to_pairs(key)
        query, key = rotated(query, cache.rotation), rotated(key, cache.rotation)
        if cache.rotate_v:
            value = rotated(value, V_ROTATION)
        # the kernel multiplies a quantized K by a query rounded to q8_0, whatever K's own bits are
        query = round_through(query, 8, CACHE_BLOCK)
    key, value = round_through(key, cache.bits, CACHE_BLOCK), round_through(value, cache.bits, CACHE_BLOCK)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    result = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    if cache.bits < 16 and cache.rotate_v:
        result = rotated(result, V_ROTATION)
    return result.transpose(1, 2).contiguous(), None


class _Rotated(torch.autograd.Function):
    """Its own derivative, as the matrix is symmetric: autograd through the steps in place takes ten times as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return walsh_hadamard_(x.clone(memory_format=torch.contiguous_format), size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return rotated(gradient, ctx.size), None


def rotated(x: Tensor, size: int) -> Tensor:
    """``x`` with each of its pieces of ``size`` multiplied by the normalised Sylvester matrix; as it is for 0 or 1."""
    return _Rotated.apply(x, size) if size > 1 else x


def _halves_to_pairs(x: Tensor) -> Tensor:
    """Order of a head's values: first and second halves interleaved, ``[..., head_dim]``."""
    *lead, width = x.shape
    return x.reshape(*lead, 2, width // 2).transpose(-1, -2).reshape(x.shape)
