"""Upstream's q4_0 in numpy: layout, and what is refused. Agreement with ggml: tests/reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kurtail_gguf.formats import kt4, q4_0
from kurtail_gguf.formats.targets import BLOCK_FORMATS


@st.composite
def packed_parts(draw):
    rows, blocks = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    codes = draw(hnp.arrays(np.int8, (rows, blocks * 32), elements=st.integers(-8, 7)))
    scales = draw(hnp.arrays(np.float16, (rows, blocks), elements=st.floats(-65504, 65504, width=16)))
    return codes, scales


@given(packed_parts())
def test_unpack_inverts_pack_bit_for_bit(parts):
    codes, scales = parts
    data = q4_0.pack(codes, scales)
    assert data.shape == (len(codes), scales.shape[1] * 18)
    back_codes, back_scales = q4_0.unpack(data)
    assert np.array_equal(back_codes, codes)
    assert back_scales.tobytes() == scales.tobytes()


@given(hnp.arrays(np.uint8, 36))
def test_every_byte_pattern_with_a_finite_scale_survives(data):
    data[[1, 19]] &= 0xBF  # exponent below 31: neither NaN nor infinite
    assert np.array_equal(q4_0.pack(*q4_0.unpack(data)), data)


def test_layout_is_upstreams():
    codes = np.zeros((1, 32), np.int8)
    codes[0, [0, 15, 16, 31]] = -8, 7, -1, 3
    data = q4_0.pack(codes, np.array([[-0.5]], np.float16))[0]
    assert data[:2].tobytes() == np.array(-0.5, "<f2").tobytes()
    assert data[2] == 0x70  # element 0 low (-8 + 8), element 16 high (-1 + 8)
    assert data[17] == 0xBF  # element 15 low (7 + 8), element 31 high (3 + 8)
    assert (data[3:17] == 0x88).all()  # zeros


@pytest.mark.parametrize(
    ("codes", "scales", "message"),
    [
        (np.zeros((1, 31), np.int8), np.zeros((1, 1), np.float16), "multiple of 32"),
        (np.full((1, 32), 8, np.int8), np.ones((1, 1), np.float16), "-8…7"),
        (np.zeros((1, 32), np.int8), np.full((1, 1), np.nan, np.float16), "NaN"),
        (np.zeros((1, 32), np.int16), np.zeros((1, 1), np.float16), "expected int8"),
        (np.zeros((1, 64), np.int8), np.zeros((1, 1), np.float16), "do not fit"),
    ],
)
def test_pack_refuses(codes, scales, message):
    with pytest.raises(ValueError, match=message):
        q4_0.pack(codes, scales)


def test_unpack_refuses_half_a_block():
    with pytest.raises(ValueError, match="multiple of 18"):
        q4_0.unpack(np.zeros((2, 27), np.uint8))


@pytest.mark.parametrize(("target", "module"), [("kurtail", kt4), ("stock", q4_0)])
def test_targets_are_the_formats(target, module):
    known = BLOCK_FORMATS[target]
    assert (known.type_id, known.block) == (module.TYPE_ID, module.BLOCK)
    row = known.pack(np.zeros((1, known.block), np.int8), np.ones((1, 1), np.float16))
    assert row.shape == (1, module.TYPE_SIZE)
