"""Rows of a checkpoint's matrix, found again in what upstream's converter makes of it."""

from __future__ import annotations

import numpy as np
import pytest

from kurtail_gguf.numerics.formats import kt4
from kurtail_gguf.runtime.export.rows import Rows, find_rows, row_sums


@pytest.fixture
def matrix() -> np.ndarray:
    """Float32 ``[12, 192]``."""
    return np.random.default_rng(1).standard_normal((12, 192)).astype(np.float32)


def _found(source: np.ndarray, stored: np.ndarray) -> Rows | None:
    return find_rows(row_sums(source), row_sums(stored), "layers.0.up")


def test_some_rows_in_another_order(matrix):
    found = _found(matrix, matrix[[7, 2, 2]])
    assert (found.places.tolist(), found.factors, found.blocks) == ([7, 2, 2], None, None)


def test_all_rows_times_factors(matrix):
    factors = np.float32([1.3, 0.7, -0.5] * 4)
    found = _found(matrix, matrix * factors[:, None])
    np.testing.assert_allclose(found.factors, factors, rtol=1e-6)
    assert (found.places.tolist(), found.blocks) == (list(range(12)), None)
    # as bfloat16, a factor leaves other values
    coarse = (matrix * factors[:, None]).view(np.uint32) & 0xFFFF0000
    assert _found(matrix, coarse.view(np.float32)) is None


def test_a_factor_of_a_single_block_says_nothing_of_the_row():
    source, other = np.random.default_rng(1).standard_normal((2, 12, 64)).astype(np.float32)
    assert _found(source, other) is None
    assert _found(source, 2 * source).factors.tolist() == [2] * 12


def test_whole_blocks_of_columns_in_another_order(matrix):
    order = [2, 0, 1]
    found = _found(matrix, matrix.reshape(12, 3, 64)[:, order].reshape(12, 192))
    assert (found.blocks.tolist(), found.factors) == (order, None)


def test_single_columns_in_another_order_are_another_matrix(matrix):
    assert _found(matrix, matrix[:, ::-1]) is None
    mixed = matrix.copy()
    mixed[3] = np.roll(matrix[3], 64)
    assert _found(matrix, mixed) is None


def test_what_is_found_is_done_to_packed_rows(matrix):
    codes, scales = kt4.quantize_reference(matrix)
    packed, values = kt4.pack(codes, scales), kt4.dequantize(codes, scales)
    places, order = np.arange(12)[::-1], np.array([1, 2, 0])

    def of(**changes) -> np.ndarray:
        return kt4.dequantize(*kt4.unpack(Rows("layers.0.up", None, places, **changes).of(packed)))

    np.testing.assert_array_equal(of(), values[places])
    np.testing.assert_array_equal(of(blocks=order), values[places].reshape(12, 3, 64)[:, order].reshape(12, 192))
    np.testing.assert_allclose(of(factors=np.full(12, 1.3)), 1.3 * values[places], rtol=1e-3)
