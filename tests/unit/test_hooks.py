"""What is hung on transformers' modules, and that it comes off again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kurtail_gguf.numerics.hadamard import sylvester
from kurtail_gguf.numerics.simulation.attention import CacheSettings, rotated
from kurtail_gguf.numerics.simulation.hooks import round_cache, round_input


@pytest.mark.parametrize("r4", [0, 1, 4])
def test_an_input_is_rotated_and_then_rounded(r4):
    linear = torch.nn.Linear(8, 3, bias=False)
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    turned = x
    if r4 == 4:
        turned = x @ torch.block_diag(*[torch.from_numpy(sylvester(4)).float()] * 2)
    plain = linear(x)
    handle = round_input(linear, torch.round, r4)
    assert torch.allclose(linear(x), turned.round() @ linear.weight.T)
    handle.remove()
    assert torch.equal(linear(x), plain)


def test_nothing_is_computed_without_a_rotation():
    x = torch.ones(2, 7)
    assert rotated(x, 0) is x and rotated(x, 1) is x


def test_every_layer_is_told_of_its_cache():
    layers = [SimpleNamespace(self_attn=SimpleNamespace()) for _ in range(2)]
    cache = CacheSettings(4, 64, False, True)
    round_cache(layers, cache)
    assert [layer.self_attn.kurtail_cache for layer in layers] == [cache, cache]
