"""A GGUF file, or all parts of one that was split: its keys, and where its tensors lie."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kurtail_gguf.files.kinds import refuse_pointer
from kurtail_gguf.messages.errors import KurtailError, SourceError
from kurtail_gguf.runtime.file_tensors import FileTensors
from kurtail_gguf.runtime.gguf_info import GgufInfo, TensorInfo, read_gguf

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A GGUF file that is a model.

    Args:
        path: as it was given.
        parts: itself, or all parts in order.
    """

    path: Path
    parts: tuple[GgufInfo, ...]

    @property
    def metadata(self) -> Mapping[str, Any]:
        """All keys; those of a split file are in its first part."""
        return self.parts[0].metadata

    @property
    def first(self) -> Path:
        """The file that has the keys."""
        return self.parts[0].path

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors by name."""
        return {tensor.name: tensor for part in self.parts for tensor in part.tensors}

    @property
    def bytes(self) -> int:
        """Size of all parts."""
        return sum(part.path.stat().st_size for part in self.parts)

    def open(self) -> dict[str, FileTensors]:
        """What reads each tensor, by its name."""
        found = {}
        for part in self.parts:
            reader = FileTensors(part)
            found |= {tensor.name: reader for tensor in part.tensors}
        return found


def paths_of(path: Path) -> list[Path]:
    """A file, or all parts of a split one, as far as its name tells."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    return [path.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf") for number in range(1, int(match[3]) + 1)]


def open_source(path: Path) -> SourceFile:
    """Read keys and names of tensors, of all parts where the file was split, whichever of them is given.

    Raises:
        SourceError: not a GGUF file, a damaged one, a part that is missing, or a file that convert wrote.
    """
    info = _read(path)
    # llama-gguf-split leaves a 0 in what it has merged
    count = info.metadata.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        parts = (info,)
    else:
        paths = paths_of(path)
        if len(paths) != count:
            raise SourceError(
                f"{path} is one of {count} parts of a model, but its name does not say which: name them "
                f"NAME-00001-of-{count:05}.gguf and so on, or merge them with llama-gguf-split --merge"
            )
        if missing := [part.name for part in paths if not part.is_file()]:
            raise SourceError(
                f"{path} is one of {count} parts of a model, but {missing[0]} is not beside it: download all parts into one directory"
            )
        parts = tuple(info if part == path else _read(part) for part in paths)
        expected, found = parts[0].metadata.get("split.tensors.count"), sum(len(part.tensors) for part in parts)
        if expected is not None and expected != found:
            raise SourceError(f"{path}: the {count} parts hold {found} tensors, but should hold {expected}: download them again")
    if any(key.startswith("kurtail.") for key in parts[0].metadata):
        raise SourceError(
            f"{path} was written by kurtail-gguf, and its weights are no longer the model's: convert the model that it was made of"
        )
    if "general.architecture" not in parts[0].metadata:
        raise SourceError(f"{path} does not name its architecture: key general.architecture is missing: download it again")
    return SourceFile(path, parts)


def _read(path: Path) -> GgufInfo:
    refuse_pointer(path, SourceError)
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise SourceError(f"{path} is not a GGUF file (its first bytes are not 'GGUF')")
    try:
        return read_gguf(path)
    except KurtailError as error:  # bad input: convert keeps nothing of it, as of every SourceError
        raise SourceError(str(error)) from error
