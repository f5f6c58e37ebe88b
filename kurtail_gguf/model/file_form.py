"""What a GGUF file says of a model, and what of it is peculiar to a family: the data that its entry has for reading files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kurtail_gguf.messages.errors import SourceError

_NEEDED = object()
REMEDY = "convert from the Hugging Face checkpoint instead"


class FileKeys:
    """A file's hyper-parameters, by their keys behind the architecture's name. What was not asked for is known afterwards.

    Args:
        path: of the file, for messages.
        metadata: all of its keys.
        shapes: of its tensors, outermost dimension first.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.path, self.shapes = path, shapes
        self.prefix = f"{metadata['general.architecture']}."
        self._metadata = metadata
        self._asked: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self.prefix + key in self._metadata

    def get(self, key: str, default: Any = _NEEDED) -> Any:
        """A value as it is. A list of the same value for each layer is that value.

        Raises:
            SourceError: there is none, and no default.
        """
        self._asked.add(key)
        if key not in self:
            if default is _NEEDED:
                raise SourceError(f"{self.path} lacks key {self.prefix}{key}: {REMEDY}")
            return default
        value = self._metadata[self.prefix + key]
        if isinstance(value, list) and value and not isinstance(value[0], bool) and value == value[:1] * len(value):
            return value[0]
        return value

    def size(self, key: str, default: Any = _NEEDED) -> int:
        """A whole number."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(key, f"must be one whole number for all layers: {REMEDY}")
        return value

    def real(self, key: str, default: Any = _NEEDED) -> float:
        """A number in single precision, as the shortest decimal that is rounded to it: what a config.json says."""
        value = self.get(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(key, f"must be one number for all layers: {REMEDY}")
        return float(str(np.float32(value))) if float(np.float32(value)) == value else float(value)

    def flag(self, key: str, default: Any = _NEEDED) -> bool:
        """Yes or no."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, f"must be true or false: {REMEDY}")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Refuse a key with a value that would be lost.

        Args:
            key: which may be missing.
            allowed: values that say what config.json says anyway.
        """
        if self.get(key, allowed[0]) not in allowed:
            raise self.refuse(key, f"is not supported: {REMEDY}")

    def refuse(self, key: str, why: str) -> SourceError:
        """An error that names file, key and value."""
        value = repr(self._metadata.get(self.prefix + key))
        return SourceError(f"{self.path}: key {self.prefix}{key} ({value if len(value) <= 60 else f'{value[:57]}…'}) {why}")

    def unasked(self) -> list[str]:
        """Keys that nobody asked for, behind the architecture's name."""
        ours = (key.removeprefix(self.prefix) for key in self._metadata if key.startswith(self.prefix))
        return [key for key in ours if key not in self._asked]


@dataclass(frozen=True, slots=True)
class FileForm:
    """A family's peculiarities in a GGUF file, beside those that :class:`~kurtail_gguf.model.family.Family` has for itself.

    What is the same for all families (sizes, RoPE, norms, biases, experts) is in kurtail_gguf/model/loading/from_gguf/config.py.

    Args:
        name: what the file calls the architecture (``general.architecture``).
        told_by: where several families share that name, whether a file is of this one.
        keys: key of the file, behind the architecture's name -> key of config.json that has the same number. The file must have it.
        config: what else config.json has by the file; called last, so that it may say otherwise.
        period: layers from one without a window to the next, which upstream's graph has as a constant; 0 where there is none.
        window_base: RoPE's base in layers with a window, where the file says none; 0 for that of the others.
        rope: key of ``rope_parameters`` -> key of the file that has the same number. The file must have it.
    """

    name: str
    told_by: Callable[[FileKeys], bool] | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    config: Callable[[FileKeys], dict[str, Any]] | None = None
    period: int = 0
    window_base: float = 0.0
    rope: Mapping[str, str] = field(default_factory=dict)
