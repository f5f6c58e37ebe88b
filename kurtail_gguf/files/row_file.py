"""Large arrays on disk, a few rows at a time and never mapped.

Pages of a mapped file count as this program's memory until the system wants them back, and a full disk under one ends
the program with SIGBUS. Reading and writing pieces has neither, and the file is a .npy all the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt


class RowFile:
    """A .npy file of float32 whose first axis is read and written in pieces.

    Args:
        path: the file; made anew, all zeros, where ``shape`` is given.
        shape: of the whole array.
    """

    def __init__(self, path: Path, shape: Sequence[int] | None = None) -> None:
        if shape is not None:
            _create(path, tuple(shape))
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            self.shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            self._start = file.tell()
        if fortran or dtype != np.float32:
            raise ValueError(f"{path} does not contain rows of float32")
        self._row = math.prod(self.shape[1:])
        self._file = path.open("r+b" if shape is not None else "rb", buffering=0)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> npt.NDArray[np.float32]:
        """A copy of consecutive rows."""
        start, stop, _ = rows.indices(len(self))
        count = max(0, stop - start)
        self._file.seek(self._start + 4 * start * self._row)
        found = np.fromfile(self._file, np.float32, count * self._row)
        return found.reshape(count, *self.shape[1:])

    def __setitem__(self, rows: slice, values: npt.NDArray[np.float32]) -> None:
        """Overwrite consecutive rows.

        Raises:
            OSError: a full disk.
        """
        start, stop, _ = rows.indices(len(self))
        content = np.ascontiguousarray(values, np.float32)
        if content.shape != (stop - start, *self.shape[1:]):
            raise ValueError(f"{content.shape} does not fit rows {start} to {stop} of {self.shape}")
        self._file.seek(self._start + 4 * start * self._row)
        rest = memoryview(content).cast("B")
        while rest:
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Close the file; its content stays."""
        self._file.close()


def _create(path: Path, shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 4 * math.prod(shape))
