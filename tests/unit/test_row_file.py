"""Rows on disk, read and written in pieces."""

from __future__ import annotations

import numpy as np
import pytest

from kurtail_gguf.files.row_file import RowFile


def test_pieces_are_those_of_a_npy_file(tmp_path):
    path = tmp_path / "x.npy"
    values = np.random.default_rng(0).standard_normal((7, 3, 5)).astype(np.float32)
    rows = RowFile(path, values.shape)
    assert not np.load(path).any()
    for start in range(0, 7, 2):
        rows[start : start + 2] = values[start : start + 2]
    assert np.array_equal(np.load(path), values)
    assert np.array_equal(rows[2:5], values[2:5])
    rows[0:2] += np.float32(1)
    rows.close()
    again = RowFile(path)
    assert (len(again), again.shape) == (7, (7, 3, 5))
    assert np.array_equal(again[0:2], values[:2] + 1)
    assert np.array_equal(again[5:100], values[5:])
    assert again[7:9].shape == (0, 3, 5)


def test_what_does_not_fit_is_a_mistake(tmp_path):
    rows = RowFile(tmp_path / "x.npy", (4, 2))
    with pytest.raises(ValueError, match="does not fit"):
        rows[0:2] = np.zeros((3, 2), np.float32)
    np.save(tmp_path / "y.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match="float32"):
        RowFile(tmp_path / "y.npy")
