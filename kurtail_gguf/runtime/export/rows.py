"""Rows of matrices on their way to a file: found again where upstream reordered them, and written when their turn comes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
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


def rows_file(directory: Path, name: str, expert: int | None = None) -> Path:
    """Where the packed rows of a matrix are, ``rows`` uint8 ``[rows, row_bytes]``: a linear's, or those of one of its experts."""
    return directory / (f"{name}.safetensors" if expert is None else f"{name}.{expert}.safetensors")


def row_sums(rows: Floats) -> npt.NDArray[np.float64]:
    """A number for each row of ``[n, k]``: equal rows have the same, and different ones the same by accident never.

    Columns in another order make other rows.
    """
    weights = np.random.default_rng(0).standard_normal(rows.shape[1])
    step = max(1, CHUNK_BYTES // (8 * rows.shape[1]))
    parts = (rows[start : start + step] for start in range(0, len(rows), step))
    return np.concatenate([(np.ascontiguousarray(part) * weights).sum(1) for part in parts])


def places_of(source: npt.NDArray[np.float64], found: npt.NDArray[np.float64]) -> npt.NDArray[np.int64] | None:
    """Numbers of the rows ``[m]`` of a matrix that are those of another, both by their sums ``[n]`` and ``[m]``; None where
    some are not."""
    order = np.argsort(source, kind="stable")
    places = order[np.minimum(np.searchsorted(source[order], found), len(source) - 1)]
    return places if np.array_equal(source[places], found) else None


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a matrix of the checkpoint, in the order of the file.

    Args:
        linear: the weight's name from the list of layers on.
        expert: which of its matrices; None where it is one.
        places: numbers of the rows, int64 ``[m]``.
    """

    linear: str
    expert: int | None
    places: npt.NDArray[np.int64]


class KnownRows:
    """Matrices of the layers' linears, known by their rows' values.

    Args:
        sums: by the weights' names from the list of layers on, ``layers.0.…``: of each matrix's rows, float64
            ``[rows]`` or ``[experts, rows]``.
        columns: as many values a row has.
    """

    def __init__(self, sums: Mapping[str, npt.NDArray[np.float64]], columns: Mapping[str, int]) -> None:
        self._layers: dict[int, list[str]] = {}
        for name in sums:
            self._layers.setdefault(int(name.split(".")[1]), []).append(name)
        self._sums, self._columns = sums, columns

    def find(self, layer: int, matrices: Floats) -> list[Rows] | None:
        """Whose rows some matrices of a layer are.

        Args:
            layer: its number.
            matrices: ``[rows, columns]``, or of each expert in turn ``[experts, rows, columns]``.

        Returns:
            For each matrix; all are of one linear. None where some row is none of a linear's.
        """
        names = [name for name in self._layers.get(layer, ()) if self._columns[name] == matrices.shape[-1]]
        found = [row_sums(one) for one in (matrices if matrices.ndim == 3 else matrices[None])]
        return next((rows for name in names if (rows := self._of(name, found, matrices.ndim == 3)) is not None), None)

    def _of(self, name: str, found: list[npt.NDArray[np.float64]], experts: bool) -> list[Rows] | None:
        own = self._sums[name]
        if experts != (own.ndim == 2) or (experts and len(own) != len(found)):
            return None
        rows = []
        for number, one in enumerate(found):
            places = places_of(own[number] if experts else own, one)
            if places is None:
                return None
            rows.append(Rows(name, number if experts else None, places))
        return rows
