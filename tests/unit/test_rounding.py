"""The simulation's roundings against the oracle of the format and against plain arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kurtail_gguf.numerics.formats import kt4
from kurtail_gguf.numerics.simulation.rounding import round_4bit, round_8bit, round_to


def _rows(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((16, 256)).astype(np.float32) * rng.uniform(1e-3, 1e3, (16, 1)).astype(np.float32)
    rows[0] = 0
    rows[1, 5], rows[1, 9] = 7.0, -7.0  # a tie in magnitude: the first decides the sign
    rows[2, :64] = -3.0
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_round_4bit_is_the_oracle(seed):
    rows = _rows(seed)
    expected = kt4.dequantize(*kt4.quantize_reference(rows))
    np.testing.assert_array_equal(round_4bit(torch.from_numpy(rows), kt4.BLOCK).numpy(), expected)


def test_round_4bit_is_the_oracle_at_the_extremes():
    rows = _rows(5)
    rows[3] *= np.float32(1e-42)  # too small for a scale
    rows[4] *= np.float32(1e34)  # too large for one
    rows[5] = np.random.default_rng(0).integers(-16, 17, 256) / 4  # ties everywhere
    expected = kt4.dequantize(*kt4.quantize_reference(rows))
    np.testing.assert_array_equal(round_4bit(torch.from_numpy(rows), kt4.BLOCK).numpy(), expected)


def test_blocks_are_the_same_however_many(monkeypatch):
    rows = torch.from_numpy(_rows(0))
    whole = round_4bit(rows, kt4.BLOCK)
    monkeypatch.setattr("kurtail_gguf.numerics.simulation.rounding._CHUNK", 3)
    assert torch.equal(round_4bit(rows, kt4.BLOCK), whole)


def test_a_straight_through_estimator_can_be_built_on_it():
    rows = torch.randn(2, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rounded = round_4bit(rows, kt4.BLOCK)
    assert not rounded.requires_grad
    (rows + (rounded - rows).detach()).sum().backward()
    assert torch.equal(rows.grad, torch.ones_like(rows))


def test_blocks_of_32_do_not_share_scales():
    rows = torch.ones(1, 64)
    rows[0, :32] *= 1000
    np.testing.assert_array_equal(round_4bit(rows, 32).numpy(), rows.numpy())


@pytest.mark.parametrize("seed", range(5))
def test_round_8bit_is_half_away_from_zero(seed):
    rows = _rows(seed)
    blocks = rows.reshape(-1, 32)
    scale = (np.abs(blocks).max(1, keepdims=True) / np.float32(127)).astype(np.float32)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    scaled = blocks * inverse
    codes = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))
    expected = (codes * scale.astype(np.float16).astype(np.float32)).reshape(rows.shape)
    np.testing.assert_array_equal(round_8bit(torch.from_numpy(rows), 32).numpy(), expected)


def test_sixteen_bits_are_half_precision():
    x = torch.tensor([[1.0001, 3e-6, -2.5]])
    assert torch.equal(round_to(x, 16, 32), x.half().float())


def test_unknown_bits_are_refused():
    with pytest.raises(ValueError, match="5 bits"):
        round_to(torch.zeros(1, 64), 5, 64)
