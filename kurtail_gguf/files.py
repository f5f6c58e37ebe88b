"""Files that are written whole or not at all, and what tells that one has changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kurtail_gguf.errors import KurtailError


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text so that ``path`` is either as before or complete, whatever happens."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write; it takes the other's place, on disk, if the block ends without an error.

    A kill or a power failure leaves ``path`` as it was or complete; an error leaves no scratch file behind.
    """
    scratch = path.with_suffix(".tmp")
    try:
        yield scratch
        publish(scratch, path)
    except Exception:
        scratch.unlink(missing_ok=True)
        raise


def publish(scratch: Path, target: Path) -> None:
    """Give a finished file, or a directory of files, its name, once all of it is on disk."""
    for path in (*scratch.iterdir(), scratch) if scratch.is_dir() else (scratch,):
        _sync(path)
    os.replace(scratch, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
