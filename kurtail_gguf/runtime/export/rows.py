"""Rows of matrices on their way to a file: found again where upstream reordered them, and written when their turn comes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kurtail_gguf.numerics.formats.kt4 import BLOCK, pack, unpack

#: Bytes of float32 rows that are worked on at a time.
CHUNK_BYTES = 64 << 20
#: What single precision may leave of a row that was multiplied by a factor, as a share of the row.
_FACTOR_ROUNDING = 1e-5

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
    """Two numbers for each block of each row of ``[n, k]``, float64 ``[n, k / 64, 2]``: equal blocks have the same, and different
    ones the same by accident never."""
    weights = np.random.default_rng(0).standard_normal((2, BLOCK))
    step = max(1, CHUNK_BYTES // (8 * rows.shape[1]))
    # not by a matrix product, whose rounding depends on where a row is
    parts = (np.ascontiguousarray(rows[start : start + step]).reshape(-1, 1, BLOCK) for start in range(0, len(rows), step))
    return np.concatenate([(part * weights).sum(2) for part in parts]).reshape(len(rows), -1, 2)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a matrix of the checkpoint, in the order of the file.

    Args:
        linear: the weight's name from the list of layers on.
        expert: which of its matrices; None where it is one.
        places: numbers of the rows, int64 ``[m]``.
        factors: what the rows are multiplied by, float64 ``[m]``; None for nothing.
        blocks: the order of each row's blocks, int64 ``[columns / 64]``; None for that of the checkpoint.
    """

    linear: str
    expert: int | None
    places: npt.NDArray[np.int64]
    factors: npt.NDArray[np.float64] | None = None
    blocks: npt.NDArray[np.int64] | None = None

    def of(self, packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The file's rows, of all those of the matrix ``[n, row_bytes]``."""
        taken = packed[self.places]
        if self.factors is None and self.blocks is None:
            return taken
        codes, scales = unpack(taken)
        if self.blocks is not None:
            codes = codes.reshape(*scales.shape, BLOCK)[:, self.blocks].reshape(codes.shape)
            scales = scales[:, self.blocks]
        if self.factors is not None:
            scales = (scales * self.factors[:, None]).astype(np.float16)
        return pack(codes, scales)


def find_rows(source: npt.NDArray[np.float64], found: npt.NDArray[np.float64], linear: str, expert: int | None = None) -> Rows | None:
    """Which rows of a matrix those of another are, both by their sums ``[n, blocks, 2]`` and ``[m, blocks, 2]``.

    They may be some of the matrix's, in any order; or all of them in the same order, each times a factor, or all with their
    blocks in another order.

    Returns:
        None where they are others.
    """
    places = _places(source, found)
    if places is not None:
        return Rows(linear, expert, places)
    if source.shape != found.shape:
        return None
    places = np.arange(len(source))
    blocks = _places(source[0], found[0])
    if blocks is not None and len(np.unique(blocks)) == len(blocks) and np.array_equal(source[:, blocks], found):
        return Rows(linear, expert, places, blocks=blocks)
    own = np.square(source).sum((1, 2))
    factors = np.divide((source * found).sum((1, 2)), own, out=np.ones_like(own), where=own > 0)
    rest = np.abs(found - source * factors[:, None, None]).max((1, 2))
    if np.all(rest <= _FACTOR_ROUNDING * np.sqrt(np.square(found).sum((1, 2)))):
        return Rows(linear, expert, places, factors)
    return None


def _places(source: npt.NDArray[np.float64], found: npt.NDArray[np.float64]) -> npt.NDArray[np.int64] | None:
    """Numbers ``[m]`` of what in ``source`` ``[n, …]`` equals each of ``found`` ``[m, …]``; None where some equals nothing."""
    source, found = source.reshape(len(source), -1), found.reshape(len(found), -1)
    weights = np.random.default_rng(1).standard_normal(source.shape[1])
    before, after = (source * weights).sum(1), (found * weights).sum(1)
    order = np.argsort(before, kind="stable")
    places = order[np.minimum(np.searchsorted(before[order], after), len(before) - 1)]
    return places if np.array_equal(source[places], found) else None


class KnownRows:
    """Matrices of the layers' linears, known by their rows' values.

    Args:
        sums: by the weights' names from the list of layers on, ``layers.0.…``: :func:`row_sums` of each matrix,
            ``[rows, blocks, 2]`` or ``[experts, rows, blocks, 2]``.
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
        if not names:
            return None  # a convolution's kernels, say
        found = [row_sums(one) for one in (matrices if matrices.ndim == 3 else matrices[None])]
        return next((rows for name in names if (rows := self._of(name, found, matrices.ndim == 3)) is not None), None)

    def _of(self, name: str, found: list[npt.NDArray[np.float64]], experts: bool) -> list[Rows] | None:
        own = self._sums[name]
        if experts != (own.ndim == 4) or (experts and len(own) != len(found)):
            return None
        rows = []
        for number, one in enumerate(found):
            expert = number if experts else None
            rows.append(find_rows(own[number] if experts else own, one, name, expert))
            if rows[-1] is None:
                return None
        return rows
