"""Format kt4: packing, the reference quantizer's formula, and its traps."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kurtail_gguf.formats import kt4

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)
BLOCKS = st.integers(1, 3)


@st.composite
def packed_parts(draw):
    rows, blocks = draw(st.integers(1, 3)), draw(BLOCKS)
    codes = draw(hnp.arrays(np.int8, (rows, blocks * 64), elements=st.integers(-8, 7)))
    scales = draw(hnp.arrays(np.float16, (rows, blocks), elements=st.floats(-65504, 65504, width=16)))
    return codes, scales


@given(packed_parts())
def test_unpack_inverts_pack_bit_for_bit(parts):
    codes, scales = parts
    data = kt4.pack(codes, scales)
    assert data.shape == (len(codes), scales.shape[1] * 34)
    back_codes, back_scales = kt4.unpack(data)
    assert np.array_equal(back_codes, codes)
    assert back_scales.tobytes() == scales.tobytes()
    assert np.array_equal(kt4.pack(back_codes, back_scales), data)


@given(hnp.arrays(np.uint8, 68))
def test_every_byte_pattern_with_a_finite_scale_survives(data):
    data[[1, 35]] &= 0xBF  # exponent below 31: neither NaN nor infinite
    assert np.array_equal(kt4.pack(*kt4.unpack(data)), data)


def test_layout_is_the_documents():
    codes = np.zeros((1, 64), np.int8)
    codes[0, [0, 31, 32, 63]] = -8, 7, -1, 3
    data = kt4.pack(codes, np.array([[-0.5]], np.float16))[0]
    assert data[:2].tobytes() == np.array(-0.5, "<f2").tobytes()
    assert data[2] == 0xF8  # element 0 low (-8), element 32 high (-1)
    assert data[33] == 0x37  # element 31 low (7), element 63 high (3)


@pytest.mark.parametrize(
    ("codes", "scales", "message"),
    [
        (np.zeros((1, 63), np.int8), np.zeros((1, 1), np.float16), "63"),
        (np.full((1, 64), 8, np.int8), np.ones((1, 1), np.float16), "-8…7"),
        (np.zeros((1, 64), np.int8), np.full((1, 1), np.nan, np.float16), "NaN"),
        (np.zeros((1, 64), np.int8), np.full((1, 1), np.inf, np.float16), "infinite"),
        (np.zeros((1, 128), np.int8), np.zeros((1, 1), np.float16), "do not fit"),
    ],
)
def test_pack_refuses(codes, scales, message):
    with pytest.raises(ValueError, match=message):
        kt4.pack(codes, scales)


def _scalar_reference(block: np.ndarray) -> tuple[list[int], np.float16]:
    """docs/format.md, step by step, one float32 at a time."""
    f = np.float32
    m = f(0)
    for x in block:
        if abs(x) > abs(m):
            m = x
    d = f(m / f(-8))
    with np.errstate(divide="ignore", over="ignore"):
        inverse = f(0) if d == 0 else f(f(1) / d)
    if not math.isfinite(inverse):
        inverse = f(0)
    codes = [min(7, round(float(f(x * inverse)))) for x in block]  # Python's round takes ties to even
    return codes, np.float16(min(max(d, f(-65504)), f(65504)))


@given(hnp.arrays(np.float32, 64, elements=FINITE))
def test_reference_is_the_formula(block):
    codes, scales = kt4.quantize_reference(block)
    expected_codes, expected_scale = _scalar_reference(block)
    assert codes.tolist() == expected_codes
    assert scales[0].tobytes() == expected_scale.tobytes()
    assert codes.min() >= -8
    assert codes.max() <= 7


@given(hnp.arrays(np.float32, (2, 128), elements=st.floats(-1000, 1000, width=32)))
def test_error_is_at_most_half_a_step_where_nothing_is_clipped(x):
    codes, scales = kt4.quantize_reference(x)
    error = np.abs(kt4.dequantize(codes, scales) - x)
    largest = np.abs(x).reshape(2, 2, 64).max(-1)
    # Half a step, and a whole one at +8, which is clipped to +7; rounding the scale to half adds
    # 2^-11 of the value, or its smallest denormal times the code.
    bound = (largest / 8 * 1.001 + largest * 2.0**-10 + 8 * 2.0**-24)[..., None]
    assert (error.reshape(2, 2, 64) <= bound).all()


def test_first_largest_value_decides_the_sign():
    block = np.zeros(64, np.float32)
    block[[3, 9]] = 2, -2
    codes, scales = kt4.quantize_reference(block)
    assert scales[0] == -0.25
    assert codes[3] == -8
    assert codes[9] == 7  # +8 does not exist


def test_a_tie_rounds_to_even():
    block = np.zeros(64, np.float32)
    block[:4] = -8, 2.5, -2.5, 3.5
    codes, _ = kt4.quantize_reference(block)
    assert codes[:4].tolist() == [-8, 2, -2, 4]


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-40, 1e-39])
def test_zeros_and_denormals_give_zero_scale(value):
    codes, scales = kt4.quantize_reference(np.full(64, value, np.float32))
    assert scales[0] == 0
    assert np.isfinite(kt4.dequantize(codes, scales)).all()


def test_huge_values_stay_finite():
    codes, scales = kt4.quantize_reference(np.full(64, 3e38, np.float32))
    assert scales[0] == -65504
    assert (codes == -8).all()
