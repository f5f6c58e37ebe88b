"""Attention over a rounded cache, as an attention function of transformers' ``AttentionInterface``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kurtail_gguf.numerics.hadamard import sylvester, walsh_hadamard_
from kurtail_gguf.numerics.simulation.rounding import CACHE_BLOCK
from kurtail_gguf.numerics.simulation.straight_through import round_through

_NAME = "kurtail_simulation"

#: The runtime rotates V by this size wherever R2 is not folded in (llama-kv-cache.cpp).
V_ROTATION = 64


#: ``rounded(x, name, bits, block)``: keys or values of a layer ("k3", "v0"), rounded, with the gradient of the identity.
Rounded = Callable[[Tensor, str, int, int], Tensor]


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's cache.

    Args:
        k_bits, v_bits: 4, 8 or 16.
        offset: what its keys are stored without, after RoPE and in transformers' order, float32 ``[kv_heads, head_dim]``;
            None for nothing. Softmax does not see it: every query adds the same number to all its scores.
    """

    k_bits: int
    v_bits: int
    offset: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """What attention does to queries, keys and values.

    Args:
        bits: of the cache, 4, 8 or 16, in layers that ``layers`` does not describe.
        rotation: size of R3 on q and k of every layer, 0 for none.
        rotate_v: whether the runtime rotates V and the result back.
        paired: whether the runtime's q and k are in RoPE pairs rather than halves.
        layers: each layer's own; empty where all are alike.
        rounded: what rounds keys and values; it must be ``round_to`` with a gradient of its own.
    """

    bits: int
    rotation: int
    rotate_v: bool
    paired: bool
    layers: tuple[LayerCache, ...] = ()
    rounded: Rounded = field(default=lambda x, _name, bits, block: round_through(x, bits, block), compare=False)

    def layer(self, number: int) -> LayerCache:
        """The cache of a layer."""
        return self.layers[number] if self.layers else LayerCache(self.bits, self.bits)

    @property
    def rotates_k(self) -> bool:
        """Whether R3 is applied: the runtime does it in all layers once the K of one is quantized."""
        return min((layer.k_bits for layer in self.layers), default=self.bits) < 16

    @property
    def rotates_v(self) -> bool:
        """The same for V, where R2 is not folded in."""
        return self.rotate_v and min((layer.v_bits for layer in self.layers), default=self.bits) < 16


def use_simulated_attention() -> str:
    """The name to give as ``attn_implementation``; ``hooks.round_cache`` tells every layer what to round."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, simulated_attention)
    return _NAME


def simulated_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    dropout: float = 0.0, softcap: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention over a rounded cache, as llama.cpp's CPU flash attention computes it.

    Args:
        module: the attention layer; carries the CacheSettings as ``kurtail_cache``, None for a cache that rounds nothing, and
            its number as ``layer_idx``.
        query: ``[batch, heads, tokens, head_dim]``, after RoPE; key and value with the KV heads.
        attention_mask: which keys each query attends to, bool or added to the scores, where it is not to all up to its own.
        scaling: of the scores.
        softcap: c in c tanh(score / c); None for no cap.

    Returns:
        ``[batch, tokens, heads, head_dim]``, and no attention weights.
    """
    cache: CacheSettings | None = module.kurtail_cache
    if cache is None:
        return _attend(query, key, value, attention_mask, scaling, softcap).transpose(1, 2).contiguous(), None
    number = module.layer_idx
    own = cache.layer(number)
    if own.offset is not None:
        key = key - own.offset.to(key)[None, :, None]
    if cache.rotates_k:
        query, key = in_cache(query, cache), in_cache(key, cache)
    if cache.rotates_v:
        value = rotated(value, V_ROTATION)
    if own.k_bits < 16:
        # the kernel multiplies a quantized K by a query rounded to q8_0, whatever K's own bits are
        query = round_through(query, 8, CACHE_BLOCK)
    key = cache.rounded(key, f"k{number}", own.k_bits, CACHE_BLOCK)
    value = cache.rounded(value, f"v{number}", own.v_bits, CACHE_BLOCK)
    result = _attend(query, key, value, attention_mask, scaling, softcap)
    if cache.rotates_v:
        result = rotated(result, V_ROTATION)
    return result.transpose(1, 2).contiguous(), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
) -> Tensor:
    """``[batch, heads, tokens, head_dim]`` of what is ready to be multiplied."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if softcap is None:
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None and query.shape[2] > 1, scale=scaling
        )
    scores = torch.tanh(query @ key.mT * (scaling / softcap)) * softcap
    if mask is None:
        # the last query is the last key's
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(key.shape[2] - query.shape[2])
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1) @ value


#: Up to this size a product with the matrix takes half the time of the additions.
_MULTIPLIED = 64


class _Rotated(torch.autograd.Function):
    """Its own derivative, as the matrix is symmetric: autograd through the steps in place takes ten times as long.

    Where it is learned through, sums may be a matrix product's; else they are those of the runtime.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return _quickly(x, size) if ctx.needs_input_grad[0] else _added(x, size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _quickly(gradient, ctx.size), None


def _added(x: Tensor, size: int) -> Tensor:
    return walsh_hadamard_(x.clone(memory_format=torch.contiguous_format), size)


def _quickly(x: Tensor, size: int) -> Tensor:
    if size > _MULTIPLIED:
        return _added(x, size)
    return (x.reshape(-1, size) @ torch.from_numpy(sylvester(size)).to(x)).reshape(x.shape)


def rotated(x: Tensor, size: int) -> Tensor:
    """``x`` with each of its pieces of ``size`` multiplied by the normalised Sylvester matrix; as it is for 0 or 1."""
    return _Rotated.apply(x, size) if size > 1 else x


def in_cache(x: Tensor, cache: CacheSettings) -> Tensor:
    """Queries or keys ``[..., head_dim]`` in the order and rotation that a quantized cache has them in."""
    return rotated(_halves_to_pairs(x) if cache.paired else x, cache.rotation)


def out_of_cache(x: Tensor, cache: CacheSettings) -> Tensor:
    """The inverse of :func:`in_cache`."""
    x = rotated(x, cache.rotation)
    return x.reshape(*x.shape[:-1], -1, 2).transpose(-1, -2).reshape(x.shape) if cache.paired else x


def _halves_to_pairs(x: Tensor) -> Tensor:
    """Order of a head's values: first and second halves interleaved, ``[..., head_dim]``."""
    *lead, width = x.shape
    return x.reshape(*lead, 2, width // 2).transpose(-1, -2).reshape(x.shape)
