"""Rows of matrices on their way to a file: found again where upstream reordered them, and written when their turn comes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

#: Bytes of float32 rows that are worked on at a time.
CHUNK_BYTES = 64 << 20

Floats = npt.NDArray[np.float32]


def chunks_of(rows: Any) -> Iterator[Floats]:
    """Float32 ``[n, k]``, an array or what is sliced like one, :data:`CHUNK_BYTES` at a time."""
    count, width = rows.shape
    step = max(1, CHUNK_BYTES // (4 * width))
    for start in range(0, count, step):
        yield rows[start : min(start + step, count)]


class RowsToWrite:
    """Packed rows that the writer asks for when their turn comes; what it expects of an ndarray.

    Args:
        shape: of the bytes, ``[rows, row_bytes]``, or with experts in front.
        chunks: yields consecutive uint8 row chunks.
        done: called once everything is written.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, shape: tuple[int, ...], chunks: Callable[[], Iterator[np.ndarray]], done: Callable[[], None]):
        self.shape = shape
        self.nbytes = math.prod(shape)
        self._chunks = chunks
        self._done = done

    def tofile(self, file: Any) -> None:
        """Write all rows to a binary file. The writer checks the count afterwards."""
        for chunk in self._chunks():
            # file.write and not ndarray.tofile: only the former's OSError says why it failed
            file.write(memoryview(np.ascontiguousarray(chunk)).cast("B"))
        self._done()


def name_below(name: str, names: Iterable[str]) -> str | None:
    """Which of some names, of tensors from the layers' list on, a name ends with; None for none."""
    parts = name.split(".")
    return next((tail for start in range(len(parts)) if (tail := ".".join(parts[start:])) in names), None)


def rows_of(source: Floats, found: Floats) -> npt.NDArray[np.int64] | None:
    """Numbers of the rows ``[m]`` of ``source`` ``[n, k]`` that are those of ``found`` ``[m, k]``; None where some are not.

    Columns in another order make other rows.
    """
    if source.shape[1] != found.shape[1]:
        return None
    # compared by one number a row: equal rows have the same, and different ones the same by accident never
    weights = np.random.default_rng(0).standard_normal(source.shape[1])
    before, after = _sums(source, weights), _sums(found, weights)
    order = np.argsort(before, kind="stable")
    places = order[np.minimum(np.searchsorted(before[order], after), len(before) - 1)]
    return places if np.array_equal(before[places], after) else None


def _sums(rows: Floats, weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    step = max(1, CHUNK_BYTES // (8 * rows.shape[1]))
    parts = (rows[start : start + step] for start in range(0, len(rows), step))
    return np.concatenate([(np.ascontiguousarray(part) * weights).sum(1) for part in parts])
