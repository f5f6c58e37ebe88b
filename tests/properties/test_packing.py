"""The block formats' bytes: ours and upstream's q4_0. Agreement with ggml: tests/reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kurtail_gguf.numerics.formats import kt4, q4_0
from kurtail_gguf.numerics.formats.targets import BLOCK_FORMATS

FORMATS = pytest.mark.parametrize("form", [kt4, q4_0], ids=["kt4", "q4_0"])


@FORMATS
@given(data=st.data())
def test_unpack_inverts_pack_bit_for_bit(form, data):
    rows, blocks = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    codes = data.draw(hnp.arrays(np.int8, (rows, blocks * form.BLOCK), elements=st.integers(-8, 7)))
    scales = data.draw(hnp.arrays(np.float16, (rows, blocks), elements=st.floats(-65504, 65504, width=16)))
    packed = form.pack(codes, scales)
    assert packed.shape == (rows, blocks * form.TYPE_SIZE)
    back_codes, back_scales = form.unpack(packed)
    assert np.array_equal(back_codes, codes)
    assert back_scales.tobytes() == scales.tobytes()
    assert np.array_equal(form.pack(back_codes, back_scales), packed)


@FORMATS
@given(data=st.data())
def test_every_byte_pattern_with_a_finite_scale_survives(form, data):
    packed = data.draw(hnp.arrays(np.uint8, 2 * form.TYPE_SIZE))
    packed[[1, 1 + form.TYPE_SIZE]] &= 0xBF  # exponent below 31: neither NaN nor infinite
    assert np.array_equal(form.pack(*form.unpack(packed)), packed)


def test_layout_of_kt4_is_the_documents():
    codes = np.zeros((1, 64), np.int8)
    codes[0, [0, 31, 32, 63]] = -8, 7, -1, 3
    data = kt4.pack(codes, np.array([[-0.5]], np.float16))[0]
    assert len(data) == 34
    assert data[:2].tobytes() == np.array(-0.5, "<f2").tobytes()
    assert data[2] == 0xF8  # element 0 low (-8), element 32 high (-1)
    assert data[33] == 0x37  # element 31 low (7), element 63 high (3)


def test_layout_of_q4_0_is_upstreams():
    codes = np.zeros((1, 32), np.int8)
    codes[0, [0, 15, 16, 31]] = -8, 7, -1, 3
    data = q4_0.pack(codes, np.array([[-0.5]], np.float16))[0]
    assert len(data) == 18
    assert data[:2].tobytes() == np.array(-0.5, "<f2").tobytes()
    assert data[2] == 0x70  # element 0 low (-8 + 8), element 16 high (-1 + 8)
    assert data[17] == 0xBF  # element 15 low (7 + 8), element 31 high (3 + 8)
    assert (data[3:17] == 0x88).all()  # zeros


@FORMATS
def test_pack_refuses(form):
    def refused(codes, scales, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            form.pack(codes, scales)

    block = form.BLOCK
    zeros, ones = np.zeros((1, block), np.int8), np.ones((1, 1), np.float16)
    refused(zeros[:, 1:], ones, f"{block - 1} values is not a multiple of {block}")
    refused(zeros + np.int8(8), ones, "-8…7")
    refused(zeros - np.int8(9), ones, "-8…7")
    refused(zeros, ones * np.float16(np.nan), "NaN")
    refused(zeros, ones * np.float16(np.inf), "infinite")
    refused(zeros.astype(np.int16), ones, "expected int8")
    refused(np.zeros((1, 2 * block), np.int8), ones, "do not fit")


@FORMATS
def test_unpack_refuses_half_a_block(form):
    with pytest.raises(ValueError, match=f"multiple of {form.TYPE_SIZE}"):
        form.unpack(np.zeros((2, form.TYPE_SIZE * 3 // 2), np.uint8))


@pytest.mark.parametrize(("target", "form"), [("kurtail", kt4), ("stock", q4_0)])
def test_targets_are_the_formats(target, form):
    known = BLOCK_FORMATS[target]
    assert (known.type_id, known.block) == (form.TYPE_ID, form.BLOCK)
    row = known.pack(np.zeros((1, known.block), np.int8), np.ones((1, 1), np.float16))
    assert row.shape == (1, form.TYPE_SIZE)
