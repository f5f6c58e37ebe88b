"""Files that are written whole or not at all, and what tells that one has changed."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from kurtail_gguf.messages.errors import KurtailError

#: What a kill leaves beside the file that it was to become: :func:`replacing`'s, and what safetensors writes for it.
SCRATCH = (".kurtail-*.tmp", ".tmp??????")


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text so that ``path`` is either as before or complete, whatever happens."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write; it takes the other's place, on disk, if the block ends without an error.

    A kill or a power failure leaves ``path`` as it was or complete; an error or an interruption leaves no scratch file
    behind, and a kill's goes with the next writing of the same file.
    """
    scratch = scratch_beside(path)
    try:
        yield scratch
        publish(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def scratch_beside(path: Path) -> Path:
    """A hidden name of this process's beside ``path``. What runs that were killed left of the same file is removed."""
    for left in path.parent.glob(f".kurtail-{glob.escape(path.name)}-*.tmp"):
        process = left.name.removesuffix(".tmp").rpartition("-")[2]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            with suppress(OSError):  # another user's, where many write
                left.unlink()
    return path.with_name(f".kurtail-{path.name}-{os.getpid()}.tmp")


def publish(scratch: Path, target: Path) -> None:
    """Give a finished file, or a directory of files, its name, once all of it is on disk."""
    for path in (*scratch.iterdir(), scratch) if scratch.is_dir() else (scratch,):
        _sync(path)
    os.replace(scratch, target)
    _sync(target.parent)


def remove(path: Path) -> None:
    """Remove a file or a directory of files, whole or not at all; nothing where it is not there."""
    if path.is_dir():
        # half a directory must never have the name of a whole one
        doomed = path.with_name(f"{path.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def filling(target: Path) -> Iterator[Path]:
    """A fresh directory to fill; it becomes ``target`` when the block ends without an error."""
    scratch = target.with_name(target.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    yield scratch
    publish(scratch, target)


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
