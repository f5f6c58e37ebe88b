"""The work directory: finished stages as checkpoints, the settings they were made with, and who is at work there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from kurtail_gguf.convert.stages import STAGES
from kurtail_gguf.files.atomic import SCRATCH, remove, write_atomically
from kurtail_gguf.files.locks import lock
from kurtail_gguf.messages.errors import KurtailError

_SETTINGS = "settings.json"
#: The first file in a work directory and the last: it also tells that what lies beside it is ours to remove.
_LOCK = "kurtail-gguf.lock"

#: What a conversion leaves in a work directory, later stages first: removing the first few leaves a directory that a run
#: can go on from.
_RESULTS = tuple(name for stage in reversed(STAGES) for name in stage.leaves)
_SCRATCH = ("*.partial", "*.removed", *SCRATCH, "prefix-*.npy", "source.*")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Be the only run in a work directory, which is made where it is missing.

    The system gives the lock back however a run ends. A directory that is empty at the end is removed.

    Raises:
        KurtailError: another run is at work there, the directory cannot be made, or holds files of somebody else's.
    """
    path = directory / _LOCK
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _check_ours(directory)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise KurtailError(f"work directory {directory} cannot be used: {error.strerror}") from None
    with file:
        if not _acquired(file, path):
            file.seek(0)
            who = file.read().strip() or "unknown"
            raise KurtailError(
                f"work directory {directory} is in use by another run (process {who}): wait for it, or give another --work-dir"
            )
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            _leave(directory)


def _check_ours(directory: Path) -> None:
    """Refuse a directory that is not empty and in which no run has been: others' files may have the names of stages."""
    names = os.listdir(directory)
    if not names or _LOCK in names:
        return
    try:
        settings = json.loads((directory / _SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = None
    # someone may have taken the lock for a stale one and removed it
    if not isinstance(settings, dict) or not str(settings.get("tool")).startswith("kurtail-gguf "):
        raise KurtailError(
            f"work directory {directory} is not empty and contains no conversion, so its files would be lost; give "
            "--work-dir an empty or a new directory"
        )


def _acquired(file: TextIO, path: Path) -> bool:
    """Whether this run has the lock now.

    Raises:
        KurtailError: nobody can have it there.
    """
    try:
        lock(file.fileno(), wait=False)
    except BlockingIOError:
        return False
    except OSError as error:
        _leave(path.parent)
        raise KurtailError(
            f"work directory {path.parent} cannot be locked ({error.strerror}): its file system has no locks; give "
            "--work-dir a directory on another one"
        ) from None
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False  # the run that had it is just leaving


def _leave(directory: Path) -> None:
    """Remove a directory that holds nothing but the lock; what is finished stays, and the lock with it."""
    try:
        if os.listdir(directory) == [_LOCK]:
            (directory / _LOCK).unlink()
            directory.rmdir()
    except OSError:
        pass  # another run has come or gone


def open_work_dir(directory: Path, settings: Mapping[str, object]) -> bool:
    """Make sure that the directory, which is locked, belongs to a run with the same settings, or to none yet.

    Args:
        directory: the work directory.
        settings: everything a stage's result depends on, as JSON values.

    Returns:
        Whether it belongs to an earlier run, whose results are taken over.

    Raises:
        KurtailError: it was made with other settings (the message names them), or cannot be written.
    """
    path = directory / _SETTINGS
    wanted = json.loads(json.dumps(dict(settings)))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            # stages of nobody knows which run: without its settings they are worth nothing
            discard(directory)
            write_atomically(path, json.dumps(wanted, indent=2, sort_keys=True) + "\n")
            return False
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KurtailError(f"work directory {directory} cannot be used: {error}") from error
    if not isinstance(found, dict):
        raise KurtailError(f"work directory {directory} cannot be used: {path} is not a JSON object: give --restart")
    differing = [
        f"{key} was {found.get(key)}, now {wanted.get(key)}"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]
    if differing:
        raise KurtailError(
            f"{directory} contains a run with other settings ({'; '.join(differing)}): give --restart to start over there, "
            "or another --work-dir"
        )
    for scratch in [path for pattern in SCRATCH for path in directory.rglob(pattern)]:
        scratch.unlink()  # a killed run's, which later stages would take for a result
    return True


def discard(directory: Path, source: bool = False) -> None:
    """Remove what conversions left in a work directory, and nothing else; a kill in between does no harm.

    Args:
        directory: the work directory.
        source: also the checkpoint that a GGUF file was read into.
    """
    for name in (*_RESULTS, *(["source"] if source else []), _SETTINGS):
        remove(directory / name)
    for pattern in _SCRATCH:
        for path in directory.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
