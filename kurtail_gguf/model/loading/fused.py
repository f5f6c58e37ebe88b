"""Linears that a checkpoint keeps in one tensor, read as the single ones that they are: experts stacked, gate above up."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

#: ``{name below the layer's prefix: names of what it is}``; the latter lie one above the other, and have ``{}`` for an
#: expert's number where experts are stacked.
Fused = Mapping[str, tuple[str, ...]]

_LAYER = re.compile(r"(model\.layers\.\d{1,9}\.)(.+)")


@dataclass(frozen=True, slots=True)
class Part:
    """Where a linear lies: ``stored[expert, rows]``, or ``stored[rows]`` where ``expert`` is None."""

    stored: str
    expert: int | None
    rows: slice


def parts_of(name: str, reader: Any, fused: Fused) -> Iterator[tuple[str, Part]]:
    """The linears in a tensor of a file, by their names; nothing where it is none of the fused ones, or of another shape.

    Args:
        name: of the tensor.
        reader: of the file, as safetensors'.
        fused: what is fused, with suffixes (``.weight``).
    """
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in fused:
        return
    shape, names = reader.get_slice(name).get_shape(), fused[match[2]]
    stacked = "{}" in names[0]
    if len(shape) != 2 + stacked or shape[-2] % len(names):
        return
    rows = shape[-2] // len(names)
    for number, part in enumerate(names):
        for expert in range(shape[0]) if stacked else (None,):
            yield match[1] + part.format(expert), Part(name, expert, slice(number * rows, (number + 1) * rows))


class SplitReader:
    """A file's reader that gives fused linears one by one.

    Args:
        file: a context with safetensors' reader.
        parts: all fused linears of the model, by name.
    """

    def __init__(self, file: Any, parts: Mapping[str, Part]) -> None:
        self._file, self._parts = file, parts

    def __enter__(self) -> SplitReader:
        self._reader = self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def keys(self) -> list[str]:
        """Names of what is in the file, the fused linears' own."""
        stored = self._reader.keys()
        whole = {part.stored for part in self._parts.values()}
        return [name for name in stored if name not in whole] + [name for name, part in self._parts.items() if part.stored in stored]

    def get_tensor(self, name: str) -> torch.Tensor:
        """As the reader's own."""
        return self.get_slice(name)[:] if name in self._parts else self._reader.get_tensor(name)

    def get_slice(self, name: str) -> Any:
        """As the reader's own."""
        part = self._parts.get(name)
        return self._reader.get_slice(name) if part is None else _Rows(self._reader.get_slice(part.stored), part)


class _Rows:
    def __init__(self, stored: Any, part: Part) -> None:
        self._stored, self._part = stored, part

    def get_shape(self) -> list[int]:
        return [self._part.rows.stop - self._part.rows.start, self._stored.get_shape()[-1]]

    def get_dtype(self) -> str:
        return self._stored.get_dtype()

    def __getitem__(self, rows: slice) -> torch.Tensor:
        first, count = self._part.rows.start, self._part.rows.stop - self._part.rows.start
        start, stop, _ = rows.indices(count)
        wanted = slice(first + start, first + stop)
        expert = self._part.expert
        return self._stored[wanted] if expert is None else self._stored[expert : expert + 1, wanted][0]
