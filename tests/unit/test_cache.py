"""Scales and offsets of keys against attention computed plainly; the choice of bits; damages against brute force."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kurtail_gguf.messages.errors import KurtailError, SourceError
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.method.cache.choice import GOOD_ENOUGH, LIMIT, CacheBits, choose_bits, uniform
from kurtail_gguf.method.cache.condition import KeyStatistics, condition, exact_first
from kurtail_gguf.method.cache.plan import CachePlan, plan_cache
from kurtail_gguf.method.cache.streams import Streams
from kurtail_gguf.model.loading.checkpoint import open_checkpoint
from kurtail_gguf.numerics.simulation.attention import CacheSettings, LayerCache, in_cache, out_of_cache
from kurtail_gguf.numerics.simulation.rounding import CACHE_BLOCK, round_to

CPU = torch.device("cpu")
ROUNDED = CacheSettings(bits=4, rotation=0, rotate_v=False, paired=False)
IDS = np.random.default_rng(0).integers(3, 320, (4, 48)).astype(np.int32)


def _tables(positions: int, dim: int, base: float = 1e6) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_scores_change_by_a_constant_of_each_query_alone(kind, tiny_checkpoint):
    spec = open_checkpoint(tiny_checkpoint(kind)).spec
    generator = torch.Generator().manual_seed(0)
    length, dim, group = 40, spec.head_dim, spec.value_group
    mean = 30 * torch.randn(spec.kv_heads, dim, generator=generator, dtype=torch.float64)
    keys = mean[None, :, None] + torch.randn(1, spec.kv_heads, length, dim, generator=generator, dtype=torch.float64)
    queries = torch.randn(1, spec.heads, length, dim, generator=generator, dtype=torch.float64)
    tables = _tables(length, dim)
    statistics = KeyStatistics(keys.mean((0, 2)), keys.square().mean((0, 2)), queries.square().mean((0, 2)).reshape(spec.kv_heads, group, -1).mean(1), keys[:, :, 0])
    found = condition(statistics, spec, tables, ROUNDED)
    assert found.offset.any()
    q, k = apply_rotary_pos_emb(queries, keys, tables[0][None], tables[1][None])
    # scaled before RoPE, as weights are
    q2, k2 = apply_rotary_pos_emb(
        queries * found.scale.repeat_interleave(group, 0)[None, :, None], keys / found.scale[None, :, None], tables[0][None], tables[1][None]
    )
    k2 = k2 - found.offset.double()[None, :, None]
    plain, changed = q @ k.repeat_interleave(group, 1).mT, q2 @ k2.repeat_interleave(group, 1).mT
    difference = plain - changed
    assert difference.abs().max() > 1
    assert (difference - difference[..., :1]).abs().max() < 1e-9 * plain.abs().max()
    # and what is left is smaller: that is what it is for
    assert k2.square().mean() < 0.5 * k.square().mean()


def test_the_offset_is_the_mean_key_over_the_positions(tiny_checkpoint):
    spec = open_checkpoint(tiny_checkpoint("llama")).spec
    mean = torch.randn(spec.kv_heads, spec.head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tables = _tables(100, spec.head_dim)
    ones = torch.ones_like(mean)
    found = condition(KeyStatistics(mean, mean.square() + 0.01 * ones, ones, mean[None]), spec, tables, ROUNDED)
    _, turned = apply_rotary_pos_emb(mean[None, :, None], mean[None, :, None].expand(-1, -1, 100, -1), tables[0][None], tables[1][None])
    assert torch.allclose(found.offset.double() * found.scale, turned[0].mean(1), atol=1e-6)
    # without RoPE it is the mean itself
    found = condition(KeyStatistics(mean, mean.square() + 0.01 * ones, ones, mean[None]), spec, None, ROUNDED)
    assert torch.allclose(found.offset.double() * found.scale, mean, atol=1e-6)


def test_scales_balance_keys_and_queries_pair_by_pair(tiny_checkpoint):
    spec = open_checkpoint(tiny_checkpoint("llama")).spec
    shape = (spec.kv_heads, spec.head_dim)
    generator = torch.Generator().manual_seed(2)
    keys, queries = (torch.rand(shape, generator=generator, dtype=torch.float64).add(0.1) for _ in range(2))
    mean = torch.zeros(shape, dtype=torch.float64)
    found = condition(KeyStatistics(mean, keys, queries, mean[None]), spec, _tables(10, spec.head_dim), ROUNDED)
    assert not found.offset.any()
    half = spec.head_dim // 2
    assert torch.equal(found.scale[:, :half], found.scale[:, half:])
    assert torch.allclose(found.scale.log().mean(-1), torch.zeros(spec.kv_heads, dtype=torch.float64), atol=1e-12)
    k, q = (energy[:, :half] + energy[:, half:] for energy in (keys, queries))
    balanced = (k / found.scale[:, :half] ** 2) / (q * found.scale[:, :half] ** 2)
    assert torch.allclose(balanced / balanced[:, :1], torch.ones_like(balanced))


@pytest.mark.parametrize(("rotation", "paired"), [(0, False), (64, False), (64, True), (32, True)])
def test_a_first_key_that_is_always_the_same_is_not_rounded(rotation, paired):
    """Through the attention that simulates the runtime: the offset may not change what it computes otherwise."""
    cache = CacheSettings(4, rotation, rotate_v=False, paired=paired)
    generator = torch.Generator().manual_seed(3)
    first = 8 * torch.randn(1, 2, 64, generator=generator, dtype=torch.float64)
    # the second head's depends on the token
    spread = torch.tensor([0.01, 2.0], dtype=torch.float64)[None, :, None] * torch.randn(6, 2, 64, generator=generator, dtype=torch.float64)
    offset = torch.randn(2, 64, generator=generator)
    found = exact_first(first + spread, offset, cache)
    assert torch.equal(found[1], offset[1]) and not torch.equal(found[0], offset[0])
    assert (found - offset).norm() < 0.2 * first[0, 0].norm()
    # one sequence does not tell whether others begin alike
    assert exact_first((first + spread)[:1], offset, cache) is offset

    def error(of: torch.Tensor, keys: torch.Tensor) -> float:
        stored = in_cache((keys - of).float(), cache)
        return float((round_to(stored, 4, CACHE_BLOCK) - stored).norm())

    keys = first[0, 0] + 0.01 * torch.randn(64, generator=generator, dtype=torch.float64)
    assert error(found[0], keys) < 0.2 * error(offset[0], keys)
    other = torch.randn(64, generator=generator, dtype=torch.float64)
    assert torch.allclose(out_of_cache(in_cache(other, cache), cache), other, atol=1e-12)


def test_the_first_key_is_scaled_as_rope_scales_position_0(tiny_checkpoint):
    spec = open_checkpoint(tiny_checkpoint("llama")).spec
    tables = tuple(1.25 * table for table in _tables(10, spec.head_dim))
    first = torch.randn(spec.kv_heads, spec.head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    zeros, ones = torch.zeros_like(first), torch.ones_like(first)
    found = condition(KeyStatistics(zeros, ones, ones, first.expand(3, -1, -1)), spec, tables, ROUNDED)
    stored = 1.25 * first / found.scale - found.offset
    assert torch.allclose(round_to(stored.float(), 4, CACHE_BLOCK).double(), stored, atol=1e-6)


def test_the_first_key_of_the_rounded_model_is_exact(tiny_checkpoint, tmp_path):
    """Where one token begins every sequence, all layers' are the same."""
    checkpoint = open_checkpoint(tiny_checkpoint("llama"))
    layers = checkpoint.spec.layers
    ids = IDS.copy()
    ids[:, 0] = 1
    seen = {}

    def rounded(x, name, bits, block):
        result = round_to(x, bits, block)
        seen[name] = (x, result)
        return result

    settings = dataclasses.replace(ROUNDED, rotation=32, rounded=rounded)
    streams = Streams(checkpoint, ids, None, settings, tmp_path, CPU)
    found = _found(streams, layers)
    assert all(one.offset.any() for one in found)
    keys, kept = (x[0, :, 0] for x in seen["k0"])
    assert torch.allclose(keys, kept, atol=1e-5 * float(keys.abs().max()))
    keys, kept = (x[0, :, 1:] for x in seen["k0"])
    assert not torch.allclose(keys, kept, atol=1e-2 * float(keys.abs().max()))


@given(
    damages=st.lists(st.floats(-0.01, 0.5), min_size=2, max_size=24).filter(lambda found: len(found) % 2 == 0),
    budget=st.floats(4.5, 8.5),
)
def test_bits_go_to_the_worst_within_the_budget(damages, budget):
    layers = len(damages) // 2
    names = [f"{side}{layer}" for layer in range(layers) for side in "kv"]
    named = dict(zip(names, damages, strict=True))
    found = choose_bits(named, layers, budget)
    bits = {f"k{layer}": own for layer, own in enumerate(found.k)} | {f"v{layer}": own for layer, own in enumerate(found.v)}
    assert set(found.forced) == {name for name in names if named[name] > LIMIT}
    assert all(bits[name] >= 8 for name in found.forced)
    chosen = [name for name in names if bits[name] > 4 and name not in found.forced]
    if chosen:
        assert found.mean <= budget + 1e-6
        assert min(named[name] for name in chosen) >= max((named[name] for name in names if bits[name] == 4), default=-1.0)
    else:
        left = sum(max(0.0, named[name]) for name in names if bits[name] == 4)
        one_more = (found.mean * len(names) + 4) / len(names)
        assert left <= GOOD_ENOUGH or one_more > budget or not any(0 < named[name] for name in names if bits[name] == 4)


def test_what_damages_beyond_the_limit_has_more_bits_whatever_the_budget():
    damages = {"k0": 60.0, "v0": 0.001, "k1": 0.3, "v1": 0.0}
    found = choose_bits(damages, 2, 4.5)
    assert found == CacheBits(k=(16, 8), v=(4, 4), forced=("k0", "k1"))
    assert found.mean == pytest.approx((16 + 8.5 + 4.5 + 4.5) / 4)


def test_a_fixed_cache_that_harms_is_warned_of():
    plan = CachePlan(uniform(4, 2), damages={"k0": 0.5, "v0": 0.0, "k1": 0.0, "v1": 0.01})
    assert "K of layer 0 alone cost more than 0.02 nats" in plan.warning
    assert dataclasses.replace(plan, bits=uniform(8, 2)).warning is None
    assert CachePlan(uniform(16, 2)).warning is None


def _with_bias(directory, size: float) -> None:
    """Keys with a bias in the pair that RoPE turns least, as Qwen2.5 has in some of its layers: here in the second."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    bias = tensors["model.layers.1.self_attn.k_proj.bias"]
    heads = bias.reshape(2, 2, -1)
    heads[:, :, -1] += size
    save_file(tensors, path, {"format": "pt"})


def test_damages_add_up_to_the_divergence_and_say_whose_they_are(tiny_checkpoint, tmp_path):
    model = tiny_checkpoint("qwen2")
    _with_bias(model, 30.0)
    checkpoint = open_checkpoint(model)
    layers = checkpoint.spec.layers
    streams = Streams(checkpoint, IDS, None, ROUNDED, tmp_path, CPU)
    # without the offset, which would take it away
    plain = _unprepared(streams, layers)
    everything = [LayerCache(4, 4)] * layers
    cost = _cost(streams, everything, plain, "all", NullProgress())
    damages = streams.damages(everything, plain, NullProgress())
    assert sum(damages.values()) == pytest.approx(cost.divergence, rel=0.5)
    alone = {}
    for layer in range(layers):
        for side in "kv":
            bits = [LayerCache(4 if (side, n) == ("k", layer) else 16, 4 if (side, n) == ("v", layer) else 16) for n in range(layers)]
            alone[f"{side}{layer}"] = _cost(streams, bits, plain, "one", NullProgress()).divergence
    assert sorted(damages, key=damages.get)[-2:] == sorted(alone, key=alone.get)[-2:]
    for name in sorted(alone, key=alone.get)[-2:]:
        assert damages[name] == pytest.approx(alone[name], rel=0.5)
    assert alone["k1"] > 3 * alone["k0"]


def _found(streams: Streams, layers: int):
    return streams.forward([LayerCache(4, 4)] * layers, None, "prepare", NullProgress())


def _unprepared(streams: Streams, layers: int):
    """Keys as they are."""
    return [
        dataclasses.replace(one, scale=torch.ones_like(one.scale), offset=torch.zeros_like(one.offset))
        for one in _found(streams, layers)
    ]


def _cost(streams: Streams, *arguments):
    streams.forward(*arguments)
    return streams.cost()


def test_scales_and_offsets_change_nothing_where_nothing_is_rounded(tiny_checkpoint, tmp_path):
    model = tiny_checkpoint("qwen2")
    _with_bias(model, 30.0)
    checkpoint = open_checkpoint(model)
    layers = checkpoint.spec.layers
    streams = Streams(checkpoint, IDS, None, ROUNDED, tmp_path, CPU)
    found = _found(streams, layers)
    assert found[1].offset.any()

    def exact(x, _name, _bits, _block):
        return x

    streams = Streams(checkpoint, IDS, None, dataclasses.replace(ROUNDED, rounded=exact), tmp_path, CPU)
    cost = _cost(streams, [LayerCache(16, 16)] * layers, found, "exact", NullProgress())
    assert abs(cost.divergence) < 1e-6 and cost.perplexity == pytest.approx(1, abs=1e-5)


def test_the_plan_takes_the_outlier_away_and_is_taken_over(tiny_checkpoint, tmp_path, recorder):
    """The default on a model like Qwen2.5: without offset and scales its keys at 4 bits are worth nothing."""
    model = tiny_checkpoint("qwen2")
    _with_bias(model, 100.0)
    checkpoint = open_checkpoint(model)
    layers = checkpoint.spec.layers
    streams = Streams(checkpoint, IDS, None, ROUNDED, tmp_path, CPU)
    plain = _unprepared(streams, layers)
    keys = [LayerCache(4, 16)] * layers
    before = _cost(streams, keys, plain, "before", NullProgress())
    after = _cost(streams, keys, _found(streams, layers), "after", NullProgress())
    assert after.divergence < before.divergence / 4
    arguments = (checkpoint, IDS, "auto", 4.6, None, ROUNDED, tmp_path, CPU)
    plan = plan_cache(*arguments, recorder)
    assert plan.cost.divergence < before.divergence
    assert plan.bits.mean <= 4.6 and not plan.bits.forced and plan.warning is None
    assert plan.offsets.shape == plan.scales.shape == (layers, 2, 32)
    assert all(done == total for _, total, done in recorder.stages) and not (tmp_path / "measuring-cache").exists()
    # a run that was killed just before it removed them
    (tmp_path / "measuring-cache").mkdir()
    again = plan_cache(*arguments, NullProgress())
    assert not (tmp_path / "measuring-cache").exists()
    assert (again.bits, again.damages, again.cost) == (plan.bits, plan.damages, plan.cost)
    assert np.array_equal(again.offsets, plan.offsets) and np.array_equal(again.scales, plan.scales)
    assert math.isclose(plan.cost.tokens, IDS.size / 4)  # the second halves of half of the sequences


@pytest.mark.parametrize(("window", "shape"), [(7, (4, 48)), (0, (1, 14))])
def test_too_few_tokens_are_refused_in_one_line(save_tiny, tmp_path, window, shape):
    model = tmp_path / "m"
    save_tiny("mistral", model, sliding_window=window or None)
    ids = np.full(shape, 5, np.int32)
    told = r"7 tokens are too few to measure the cache on(, sliding_window is 7)?: give --kv 16"
    with pytest.raises(SourceError, match=told):
        plan_cache(open_checkpoint(model), ids, "auto", 4.6, None, ROUNDED, tmp_path, CPU, NullProgress())
    assert not (tmp_path / "measuring-cache").exists()


def test_a_damage_that_is_no_number_is_not_taken_for_a_small_one(tiny_checkpoint, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(tiny_checkpoint("llama"))
    streams, bits = Streams(checkpoint, IDS, None, ROUNDED, tmp_path, CPU), [LayerCache(4, 4)] * checkpoint.spec.layers
    found = streams.forward(bits, None, "prepare", NullProgress())
    monkeypatch.setattr(streams, "_compare", lambda with_gradient: (None, torch.full((*IDS.shape, 128), torch.nan)))
    with pytest.raises(KurtailError, match="damage of k0 is not finite; give --kv 16"):
        streams.damages(bits, found, NullProgress())
