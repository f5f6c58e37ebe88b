"""A file's tensors as the checkpoint has them: what upstream's converter does to names, rows and gains is undone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from kurtail_gguf.files.safetensors_header import header
from kurtail_gguf.messages.errors import KurtailError, SourceError
from kurtail_gguf.model.file_form import REMEDY
from kurtail_gguf.model.loading.from_gguf.file import SourceFile
from kurtail_gguf.model.loading.from_gguf.rope import FREQUENCIES, LONG, SHORT
from kurtail_gguf.model.names import Place, checkpoint_rows, layer_places, top_places
from kurtail_gguf.model.spec import ModelSpec
from kurtail_gguf.runtime.file_tensors import FileTensors

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor as the checkpoint stores it: names of tensors that lie one above the other, once or ``stacked`` by experts."""

    stacked: bool
    parts: list[tuple[str, ...]]


class Weights:
    """The tensors of a checkpoint, each read from the file when it is asked for.

    Args:
        source: the file.
        spec: sizes and roles of the model.

    Raises:
        SourceError: a tensor that is missing, of another shape, or that would be lost.
    """

    def __init__(self, source: SourceFile, spec: ModelSpec) -> None:
        self._source, self._spec = source, spec
        #: full name -> place and shape of a tensor
        self._places: dict[str, tuple[Place, tuple[int, ...], int]] = {}
        shapes = spec.top_shapes()
        self._places |= {name: (place, shapes[name], 0) for name, place in top_places(spec).items()}
        for layer in range(spec.layers):
            shapes, prefix = spec.at(layer).layer_shapes(), spec.layer_prefix(layer)
            self._places |= {prefix + name: (place, shapes[name], layer) for name, place in layer_places(spec, layer).items()}
        self._check()
        self._stored = self._stacks()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors of the checkpoint, in the order in which they are written."""
        found = {}
        for name, stored in self._stored.items():
            below, rest = 0, ()
            for part in stored.parts[0]:
                rows, *rest = self._places[part][1]
                below += rows
            found[name] = (len(stored.parts), below, *rest) if stored.stacked else (below, *rest)
        return found

    def write(self, path: Path, finished: Callable[[str], None]) -> None:
        """Write them to a safetensors file, one tensor in memory at a time.

        Args:
            path: the file.
            finished: called with a few words after each layer, and after what is outside of them.
        """
        readers, shapes = self._source.open(), self.shapes()
        with path.open("wb") as file:
            file.write(header(shapes, "F32", 4))
            for group, names in groupby(self._stored, lambda name: name.split(".")[2] if name.startswith("model.layers.") else None):
                for one in (one for name in names for part in self._stored[name].parts for one in part):
                    self._write(one, readers[self._places[one][0].tensor], file)
                finished("embedding and head" if group is None else f"layer {group}")

    def _write(self, name: str, reader: FileTensors, file: BinaryIO) -> None:
        place, shape, layer = self._places[name]
        try:
            values = reader.values(place.tensor, place.expert)
        except KurtailError as error:
            raise SourceError(str(error)) from error
        file.write(memoryview(self._as_checkpoint(values.reshape(shape), place, layer)).cast("B"))

    def _as_checkpoint(self, values: Floats, place: Place, layer: int) -> Floats:
        spec = self._spec.at(layer)
        if place.gain:
            values = values - np.float32(spec.family.norm.offset)
        return np.ascontiguousarray(checkpoint_rows(spec, place.linear, values), np.float32)

    def _stacks(self) -> dict[str, _Stored]:
        """What the checkpoint stores, by its names, layer by layer."""
        found: dict[str, _Stored] = {}
        inside: set[str] = set()
        experts = self._spec.family.experts
        fused = (experts.fused or {}) if experts is not None else {}
        for layer in range(self._spec.layers):
            prefix = self._spec.layer_prefix(layer)
            for stored, names in fused.items():
                stacked = "{}" in names[0]
                parts = [tuple(prefix + name.format(expert) for name in names) for expert in range(self._spec.experts if stacked else 1)]
                if all(name in self._places for part in parts for name in part):
                    found[prefix + stored] = _Stored(stacked, parts)
                    inside |= {name for part in parts for name in part}
        single = {name: _Stored(False, [(name,)]) for name in self._places if name not in inside}
        return dict(sorted((single | found).items(), key=lambda item: self._places[item[1].parts[0][0]][2]))

    def _check(self) -> None:
        path, tensors = self._source.path, self._source.tensors
        lacking = [f"{place.tensor} ({name})" for name, (place, _, _) in self._places.items() if place.tensor not in tensors]
        if lacking := list(dict.fromkeys(lacking)):
            raise SourceError(f"{path} lacks tensor {_first(lacking)}: the file is incomplete; download it again")
        used = {place.tensor for place, _, _ in self._places.values()} | {FREQUENCIES, LONG, SHORT}
        # behind the layers: what predicts further tokens, and is no part of what is converted
        behind = tuple(f"blk.{layer}." for layer in range(self._spec.layers, self._spec.layers + self._predicting()))
        if lost := [name for name in tensors if name not in used and not (behind and name.startswith(behind))]:
            raise SourceError(
                f"{path}: tensor {_first(lost)} has no counterpart in {self._spec.family.architecture} and would be lost: {REMEDY}"
            )
        for name, (place, shape, layer) in self._places.items():
            found = tensors[place.tensor].shape
            expected = shape if place.expert is None else (self._spec.at(layer).experts, *shape)
            if tuple(one for one in found if one != 1) != tuple(one for one in expected if one != 1):
                raise SourceError(
                    f"{path}: tensor {place.tensor} has shape {list(found)}, but the file's keys require {list(expected)} ({name}): "
                    "the file is damaged; download it again"
                )
            if not math.prod(found):
                raise SourceError(f"{path}: tensor {place.tensor} is empty: the file is damaged; download it again")

    def _predicting(self) -> int:
        metadata = self._source.metadata
        count = metadata.get(f"{metadata['general.architecture']}.nextn_predict_layers", 0)
        return count if isinstance(count, int) else 0


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
