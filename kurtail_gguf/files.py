"""Files that are written whole or not at all, and what tells that one has changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from kurtail_gguf.errors import KurtailError


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text so that ``path`` is either as before or complete."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def file_sha256(path: Path, what: str = "file", kind: type[KurtailError] = KurtailError) -> str:
    """Hex digest of a file's bytes.

    Args:
        path: the file.
        what: what the file is to the user, for the error.
        kind: of the error.

    Raises:
        KurtailError: of that kind, where the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise kind(f"cannot read {what} {path}: {error.strerror}") from error
