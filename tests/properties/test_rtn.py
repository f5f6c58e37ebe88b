"""Round to nearest with searched scales: never worse than the plain reference, always representable."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kurtail_gguf.messages.errors import QuantizeError
from kurtail_gguf.method.quantize import rtn
from kurtail_gguf.method.quantize.rtn import quantize_rtn
from kurtail_gguf.numerics.formats import kt4


def _block_errors(weight, codes, scales):
    difference = kt4.dequantize(codes, scales).astype(np.float64) - weight
    return np.square(difference).reshape(-1, 64).sum(-1)


def _plain_errors(weight):
    """The scale that maps the largest value to −8, without any search."""
    blocks = weight.reshape(-1, 64)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    scale = (largest / -8).astype(np.float16).astype(np.float64)
    return np.square(np.clip(np.rint(blocks / scale), -8, 7) * scale - blocks).sum(-1)


@given(hnp.arrays(np.float32, (2, 128), elements=st.floats(-100, 100, width=32)))
def test_no_block_is_worse_than_the_reference(weight):
    codes, scales = quantize_rtn(torch.from_numpy(weight), "w")
    plain = _block_errors(weight, *kt4.quantize_reference(weight))
    found = _block_errors(weight, codes, scales)
    # The search compares float32 sums; the reference's codes are at most a rounding better.
    assert (found <= plain * (1 + 1e-4) + 1e-9).all()
    kt4.pack(codes, scales)  # in range and finite


@pytest.mark.parametrize("seed", range(4))
def test_search_wins_ten_percent_on_normal_weights(seed):
    weight = np.random.default_rng(seed).standard_normal((64, 512)).astype(np.float32)
    plain = _plain_errors(weight).sum()
    assert _block_errors(weight, *quantize_rtn(torch.from_numpy(weight), "w")).sum() < 0.91 * plain


def test_codes_are_the_nearest_under_the_stored_scale():
    weight = np.random.default_rng(0).standard_t(3, (8, 256)).astype(np.float32)
    codes, scales = quantize_rtn(torch.from_numpy(weight), "w")
    levels = np.arange(-8, 8, dtype=np.float32)
    step = np.repeat(scales.astype(np.float32), 64, axis=1)
    nearest = np.abs(weight[..., None] - levels * step[..., None]).min(-1)
    chosen = np.abs(weight - codes * step)
    assert np.allclose(chosen, nearest, atol=1e-5 * np.abs(step).max())


def test_chunks_do_not_change_the_result(monkeypatch):
    weight = torch.from_numpy(np.random.default_rng(1).standard_normal((10, 192)).astype(np.float32))
    whole = quantize_rtn(weight, "w")
    monkeypatch.setattr(rtn, "_CHUNK", 7)
    parts = quantize_rtn(weight, "w")
    assert np.array_equal(whole[0], parts[0])
    assert np.array_equal(whole[1], parts[1])


@pytest.mark.parametrize("block", [32, 64, 96])
def test_every_block_is_searched_by_itself(block):
    weight = torch.from_numpy(np.random.default_rng(5).standard_t(4, (6, 192)).astype(np.float32))
    codes, scales = quantize_rtn(weight, "w", block)
    assert codes.shape == (6, 192) and scales.shape == (6, 192 // block)
    for row in range(6):
        for number in range(192 // block):
            part = slice(number * block, (number + 1) * block)
            alone = quantize_rtn(weight[row : row + 1, part], "w", block)
            assert np.array_equal(codes[row : row + 1, part], alone[0])
            assert scales[row, number] == alone[1][0, 0]


def test_the_block_is_kt4s_unless_told_otherwise():
    weight = torch.from_numpy(np.random.default_rng(6).standard_normal((4, 128)).astype(np.float32))
    for default, given_64 in zip(quantize_rtn(weight, "w"), quantize_rtn(weight, "w", 64), strict=True):
        assert np.array_equal(default, given_64)


def test_rows_that_blocks_do_not_divide_are_refused():
    # [2, 48] has three blocks of 32, one of them of two rows
    with pytest.raises(ValueError, match="48"):
        quantize_rtn(torch.zeros(2, 48), "w", 32)


def test_representable_weights_are_kept_exactly():
    rng = np.random.default_rng(2)
    codes = rng.integers(-8, 8, (4, 128)).astype(np.int8)
    codes[:, ::64] = -8
    scales = np.array([[0.5, -0.25]] * 4, np.float16)
    weight = kt4.dequantize(codes, scales)
    assert np.array_equal(kt4.dequantize(*quantize_rtn(torch.from_numpy(weight), "w")), weight)


def test_zero_block_is_zero():
    codes, scales = quantize_rtn(torch.zeros(2, 64), "w")
    assert not codes.any()
    assert not scales.any()


def test_a_scale_beyond_half_names_the_tensor():
    weight = torch.zeros(1, 64)
    weight[0, 5] = 1e6
    with pytest.raises(QuantizeError, match=r"model\.layers\.3\.mlp\.up_proj\.weight.*1e\+06") as caught:
        quantize_rtn(weight, "model.layers.3.mlp.up_proj.weight")
    assert "\n" not in str(caught.value)


def test_the_largest_allowed_weight_is_finite():
    weight = torch.full((1, 64), -459_000.0)
    codes, scales = quantize_rtn(weight, "w")
    assert np.isfinite(scales).all()
    assert abs(kt4.dequantize(codes, scales) / -459_000 - 1).max() < 1e-3
