"""Exact changes of keys that leave less to round: a scale of each RoPE pair, and a constant offset.

A score is q·k, so both values of a RoPE pair may be divided by s in k and multiplied by it in q. In a block that shares a
scale, rounding k costs about (Σ m_p² / s_p²)(Σ w_p² s_p²) with the root mean squares m of k's pairs and w of q's, which
s_p² = m_p / w_p makes least (Cauchy-Schwarz).

And softmax does not see a number that is added to all scores of a query, so any vector c that does not depend on the
position may be taken off all keys after RoPE: q·(k − c) = q·k − q·c. Models with a bias of k_proj (Qwen2) or with large
gains of k's norm have most of it in pairs that RoPE turns by a fraction of a degree a token. There the mean key hardly
moves over thousands of tokens; c is its mean over the first :data:`POSITIONS`. SmoothQuant's smoothing and SageAttention's
mean of K (arXiv:2211.10438, 2410.02367) are the same algebra; here both are known before the file is written.

The offset has a second use. Most attention goes to the first token of a context, whose key is the same whatever the token is
in all but the first layers, and several times as large as others. Its rounding error would be the same in all scores of all
texts. So c is moved by that error: what is left of the first key then stands for itself in the cache (:func:`exact_first`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kurtail_gguf.model.rope import from_halves, in_halves
from kurtail_gguf.model.spec import ModelSpec
from kurtail_gguf.numerics.simulation.attention import CacheSettings, in_cache, out_of_cache
from kurtail_gguf.numerics.simulation.rounding import CACHE_BLOCK, round_to

#: Positions that the offset is the mean over. Pairs that turn more than that lose less, for as long as they turn less.
POSITIONS = 2048
#: Tokens at the start of a sequence that statistics leave out: their keys are unlike all others.
SKIPPED = 4
#: A pair is scaled by at most e^±3, 20 times.
_MAX_LOG_SCALE = 3.0
#: An offset is kept where it takes at least this share off what rounding a layer's keys costs.
_WORTH = 0.05


@dataclass(frozen=True, slots=True)
class KeyStatistics:
    """What a layer's keys and queries are before RoPE, or behind a norm that comes after it, float64 ``[kv_heads, head_dim]``
    each, and with both values of a RoPE pair in halves, whatever the checkpoint has (model/rope.py).

    Args:
        mean: of the keys.
        energy: mean of their squares.
        queries: mean of the squares of the queries that read them, over the query heads of the group as well.
        first: the key of each sequence's first token, ``[sequences, kv_heads, head_dim]``; the others are without it.
    """

    mean: Tensor
    energy: Tensor
    queries: Tensor
    first: Tensor


class KeyWatcher:
    """Gathers :class:`KeyStatistics` while a layer runs, in a ``with`` block.

    Args:
        module: the decoder layer.
        spec: sizes and roles.
    """

    def __init__(self, module: nn.Module, spec: ModelSpec) -> None:
        self._spec = spec
        self._tokens = 0
        self._sums: list[Tensor | float] = [0.0, 0.0, 0.0]
        self._first: list[Tensor] = []
        family = spec.family
        if family.key_norm:
            names = {family.query_norm: self._add_queries, family.key_norm: self._add_keys}
        elif family.fused_attention:
            names = {family.query: self._add_both}
        else:
            names = {family.query: self._add_queries, family.key: self._add_keys}
        self._handles = [
            module.get_submodule(name).register_forward_hook(lambda _m, _i, output, add=add: add(output))
            for name, add in names.items()
        ]

    def __enter__(self) -> KeyWatcher:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def statistics(self) -> KeyStatistics:
        """Of everything seen."""
        mean, energy, queries = ((total / self._tokens).cpu() for total in self._sums)
        return KeyStatistics(mean, energy, queries, torch.cat(self._first).cpu())

    def _add_both(self, output: Tensor) -> None:
        self._add_queries(output[..., self._spec.query_rows[1]])
        self._add_keys(output[..., self._spec.key_rows[1]])

    def _add_keys(self, output: Tensor) -> None:
        keys = self._heads(output, self._spec.kv_heads)
        self._first.append(self._by_head(output, self._spec.kv_heads)[:, 0])
        self._tokens += len(keys)
        self._sums[0] = self._sums[0] + keys.sum(0)
        self._sums[1] = self._sums[1] + keys.square().sum(0)

    def _add_queries(self, output: Tensor) -> None:
        heads = self._heads(output, self._spec.heads)
        energy = heads.square().sum(0).reshape(self._spec.kv_heads, self._spec.value_group, -1)
        self._sums[2] = self._sums[2] + energy.mean(1)

    def _heads(self, output: Tensor, heads: int) -> Tensor:
        """float64 ``[tokens, heads, head_dim]``."""
        tokens = self._by_head(output, heads)
        return tokens[:, min(SKIPPED, tokens.shape[1] - 1) :].flatten(0, 1)

    def _by_head(self, output: Tensor, heads: int) -> Tensor:
        """float64 ``[batch, length, heads, head_dim]`` of ``[batch, length, heads head_dim]``, or with heads apart already."""
        if self._spec.family.heads_first and output.ndim == 4:
            output = output.transpose(1, 2)
        return in_halves(output.reshape(*output.shape[:2], heads, -1).double(), self._spec)


@dataclass(frozen=True, slots=True)
class Conditioned:
    """How a layer's keys are changed.

    Args:
        scale: float64 ``[kv_heads, head_dim]``: keys are divided, their queries multiplied by it.
        offset: float32 of the same shape, of the scaled keys after RoPE; zeros where it is not worth having, or where scores
            are capped and softmax would see it. Both are in the checkpoint's order.
    """

    scale: Tensor
    offset: Tensor


def condition(
    statistics: KeyStatistics, spec: ModelSpec, turned: tuple[Tensor, Tensor] | None, cache: CacheSettings
) -> Conditioned:
    """Scale and offset of a layer's keys.

    Args:
        statistics: of the layer.
        spec: sizes and roles.
        turned: cosines and sines of the first :data:`POSITIONS` positions, ``[positions, rotary_dim]`` each, attention
            factors of YaRN and the like included; None for a layer without RoPE.
        cache: how the runtime stores keys.
    """
    rotary = 0 if turned is None or spec.family.norms_behind_rope else spec.rotary_dim
    pairs = spec.rotary_dim // 2
    offset = statistics.mean.clone()
    energy = statistics.energy.clone()
    if rotary:
        # once a pair: pairs side by side have theirs side by side too, or in halves as others do
        doubled = spec.family.interleaved and torch.equal(turned[0][:, ::2], turned[0][:, 1::2])
        cosine, sine = ((table[:, ::2] if doubled else table[:, :pairs]).double() for table in turned)
        first, second = statistics.mean[:, :pairs], statistics.mean[:, pairs:rotary]
        c, s = cosine.mean(0), sine.mean(0)
        offset[:, :rotary] = torch.cat([first * c - second * s, second * c + first * s], -1)
        energy[:, :rotary] = energy[:, :rotary] * (cosine.square() + sine.square()).mean(0).repeat(2)
    left = (_paired(energy, pairs) - _paired(offset.square(), pairs)).clamp(min=0)
    queries = _paired(statistics.queries, pairs)
    worth = 1 - _cost(left, queries) / _cost(_paired(energy, pairs), queries).clamp(min=1e-300)
    if spec.attention_cap or not worth > _WORTH:
        offset, left = torch.zeros_like(offset), _paired(energy, pairs)
    scale = _scales(left, queries, spec)
    first = statistics.first.clone()
    if rotary:
        # position 0 is not turned, but YaRN and the like scale it
        first[..., :rotary] *= cosine[0].repeat(2)
    first, offset = (from_halves(value, spec) for value in (first / scale, offset / scale))
    scale = from_halves(scale, spec)
    return Conditioned(scale, offset.float() if spec.attention_cap else exact_first(first, offset.float(), cache))


def exact_first(first: Tensor, offset: Tensor, cache: CacheSettings) -> Tensor:
    """The offset, moved so that 4 bits hold the first key exactly where it hardly depends on the token.

    Args:
        first: scaled first keys after RoPE, float64 ``[sequences, kv_heads, head_dim]``.
        offset: of the scaled keys, float32 ``[kv_heads, head_dim]``.
        cache: how the runtime stores keys.

    Returns:
        float32, as ``offset``; heads whose first keys differ among each other by more than rounding changes them are left alone.
    """
    if len(first) < 2:
        return offset
    stored = in_cache((first.mean(0) - offset).float()[None, :, None], cache)
    error = out_of_cache(stored - round_to(stored, 4, CACHE_BLOCK), cache)[0, :, 0]
    constant = first.var(0).sum(-1, keepdim=True) < error.double().square().sum(-1, keepdim=True)
    return torch.where(constant, offset + error, offset)


def _paired(energy: Tensor, pairs: int) -> Tensor:
    """Mean energy of both values of each RoPE pair, at the place of both."""
    both = (energy[:, :pairs] + energy[:, pairs : 2 * pairs]) / 2
    return torch.cat([both, both, energy[:, 2 * pairs :]], -1)


def _cost(keys: Tensor, queries: Tensor) -> Tensor:
    """What rounding a layer's keys costs with the best scales, up to a factor: Σ over heads of (Σ m w)²."""
    return (keys * queries).sqrt().sum(-1).square().sum()


def _scales(keys: Tensor, queries: Tensor, spec: ModelSpec) -> Tensor:
    """s with s² = rms(k) / rms(q), of geometric mean 1 in each head; where one of them is zero, it stays."""
    if spec.family.key_norm and not spec.family.wide_norms:
        # one gain for all heads
        keys, queries = keys.mean(0, keepdim=True), queries.mean(0, keepdim=True)
    usable = (keys > 0) & (queries > 0)
    logarithm = torch.where(usable, 0.25 * (keys / queries).log(), 0.0)
    count = usable.sum(-1, keepdim=True).clamp(min=1)
    spread = torch.where(usable, logarithm - logarithm.sum(-1, keepdim=True) / count, 0.0)
    return spread.clamp(-_MAX_LOG_SCALE, _MAX_LOG_SCALE).exp().expand(spec.kv_heads, -1).contiguous()


def turned_positions(turned: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A layer's of ``Positions.turned`` without its batch, on the CPU."""
    cosine, sine = turned
    return cosine[0].cpu(), sine[0].cpu()
