"""The numpy oracle against the runtime's C, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kurtail_gguf.numerics.formats import kt4
from kurtail_gguf.numerics.simulation.rounding import round_to
from kurtail_gguf.runtime import ggml
from kurtail_gguf.runtime.quick_rounding import QuickRounding


@pytest.fixture(scope="module")
def native() -> ggml.GgmlBase:
    return ggml.GgmlBase()


def assert_same(native: ggml.GgmlBase, x: np.ndarray) -> None:
    packed = kt4.pack(*kt4.quantize_reference(x))
    np.testing.assert_array_equal(native.quantize(x, ggml.KT4), packed)
    restored = native.dequantize(packed, ggml.KT4, x.shape[-1])
    np.testing.assert_array_equal(restored.view(np.uint32), kt4.dequantize(*kt4.unpack(packed)).view(np.uint32))


@settings(max_examples=300, deadline=None)
@given(hnp.arrays(np.float32, (2, 128), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_any_finite_values(native: ggml.GgmlBase, x: np.ndarray) -> None:
    assert_same(native, x)


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-7, 1.0, 3e4, 6e5, 1e30])
def test_normal_values_of_any_size(native: ggml.GgmlBase, scale: float) -> None:
    x = np.random.default_rng(7).standard_normal((64, 576)).astype(np.float32) * np.float32(scale)
    assert_same(native, x)


def test_special_blocks(native: ggml.GgmlBase) -> None:
    x = np.zeros((6, 64), np.float32)
    x[1, 63] = -1.0
    x[2] = np.where(np.arange(64) % 2, 4.0, -4.0)  # the largest magnitude with both signs: the first decides
    x[3] = np.arange(64) / 2 - 8  # every other value lies half-way between two codes
    x[4] = -x[3]
    x[5, :2] = [np.float32(1e-45), -np.float32(1e-45)]
    assert_same(native, x)


@pytest.mark.parametrize("shape", [(64,), (3, 5, 64), (2, 700, 576)])
def test_quick_rounding_is_that_of_the_simulation(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x.reshape(-1, 64)[0] = torch.arange(64) / 2 - 8
    if x.numel() > 640:
        x.reshape(-1, 64)[1], x.reshape(-1, 64)[2] = 0.0, 1e-44
    quick = QuickRounding()
    for bits in (4, 8):
        assert torch.equal(quick(x, bits, 64), round_to(x, bits, 64))
    strided = x.repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(quick(strided, 4, 64), round_to(x, 4, 64))


def test_block_constants_are_the_headers(native: ggml.GgmlBase) -> None:
    assert ggml.KT4 == kt4.TYPE_ID
    assert native.row_bytes(kt4.TYPE_ID, 10 * kt4.BLOCK) == 10 * kt4.TYPE_SIZE
