"""Fixtures of the unit tests: calibration text, and what stands in for the runtime."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from kurtail_gguf.convert import pipeline
from kurtail_gguf.convert.stages import export
from kurtail_gguf.measure import figures
from kurtail_gguf.method.fold import tables
from kurtail_gguf.method.fold.tables import EMBEDDING
from kurtail_gguf.method.quantize import layerwise
from kurtail_gguf.method.tuning import layer_files
from kurtail_gguf.runtime.activation_bits import VARIABLE
from kurtail_gguf.runtime.provenance import Provenance


@dataclass(frozen=True)
class Exported:
    """What the exporter was given: the directory's files, provenance, and the linears with bits of their own."""

    files: Mapping[str, bytes]
    provenance: Provenance
    bits: Mapping[str, int]
    tables: Mapping[str, int]
    online: Mapping[str, int]


@pytest.fixture(autouse=True)
def _nothing_asked_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """end_to_end/conftest.py sets the variable for a whole run, and commands take it for their option."""
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of a thousand tokens and more, whatever the tokenizer."""
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 100, encoding="utf-8")
    return path


@pytest.fixture
def exported(monkeypatch) -> list[Exported]:
    """A recorder in the exporter's place: the pipeline's calls of it."""
    calls = []

    def write_gguf(source, quantized, out, provenance, progress, tables, online, bits, k_offset, context, check, converter):
        files = {path.name: path.read_bytes() for path in sorted(quantized.iterdir())}
        calls.append(Exported(files, provenance, dict(bits), dict(tables), dict(online)))
        out.write_bytes(b"GGUF")

    monkeypatch.setattr(export, "write_gguf", write_gguf)
    # the tiny checkpoints have a byte tokenizer, which upstream does not know
    monkeypatch.setattr(pipeline, "check_header", lambda checkpoint, progress, converter: None)
    monkeypatch.setattr(pipeline, "start_converter", nullcontext)
    return calls


@pytest.fixture
def plain_embedding(monkeypatch) -> None:
    """Rows of the embedding without the runtime's q4_0, so that no runtime is needed."""

    class Rows:
        def __init__(self, directory: Path, spec) -> None:
            self._rows, self._scale = np.load(directory / EMBEDDING), spec.embedding_scale

        def __call__(self, ids):
            return self._rows[ids] * np.float32(self._scale)

    for module in (tables, layerwise, layer_files, figures):
        monkeypatch.setattr(module, "EmbeddingRows", Rows)
