"""The numpy oracle of q4_0 against libggml-base, and the scale search against llama-quantize's own rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kurtail_gguf.method.quantize.rtn import quantize_rtn
from kurtail_gguf.numerics.formats import q4_0
from kurtail_gguf.runtime import ggml


@pytest.fixture(scope="module")
def native() -> ggml.GgmlBase:
    return ggml.GgmlBase()


def assert_same_bits(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


@settings(max_examples=300, deadline=None)
@given(
    hnp.arrays(np.int8, (3, 96), elements=st.integers(-8, 7)),
    hnp.arrays(np.float16, (3, 3), elements=st.floats(-65504, 65504, width=16)),
)
def test_ggml_reads_what_is_packed(native: ggml.GgmlBase, codes: np.ndarray, scales: np.ndarray) -> None:
    read = native.dequantize(q4_0.pack(codes, scales), ggml.Q4_0, 96)
    assert_same_bits(read, q4_0.dequantize(codes, scales))


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 3e4])
def test_what_ggml_packs_is_read(native: ggml.GgmlBase, scale: float) -> None:
    x = np.random.default_rng(3).standard_normal((64, 576)).astype(np.float32) * np.float32(scale)
    packed = native.quantize(x, ggml.Q4_0)
    codes, scales = q4_0.unpack(packed)
    np.testing.assert_array_equal(q4_0.pack(codes, scales), packed)
    assert_same_bits(q4_0.dequantize(codes, scales), native.dequantize(packed, ggml.Q4_0, 576))


def test_constants_are_the_headers(native: ggml.GgmlBase) -> None:
    assert ggml.Q4_0 == q4_0.TYPE_ID
    assert native.row_bytes(q4_0.TYPE_ID, 10 * q4_0.BLOCK) == 10 * q4_0.TYPE_SIZE


@pytest.mark.parametrize("seed", range(3))
def test_no_block_is_rounded_worse_than_by_llama_quantize(native: ggml.GgmlBase, seed: int) -> None:
    weight = np.random.default_rng(seed).standard_t(5, (64, 512)).astype(np.float32)
    theirs = native.dequantize(native.quantize(weight, ggml.Q4_0), ggml.Q4_0, 512)
    packed = q4_0.pack(*quantize_rtn(torch.from_numpy(weight), "w", q4_0.BLOCK))
    ours = native.dequantize(packed, ggml.Q4_0, 512)

    def errors(values: np.ndarray) -> np.ndarray:
        return np.square(values.astype(np.float64) - weight).reshape(-1, q4_0.BLOCK).sum(-1)

    assert (errors(ours) <= errors(theirs) * (1 + 1e-4)).all()
    # a block of 32 leaves the search less to win than one of 64
    assert errors(ours).sum() < 0.95 * errors(theirs).sum()
