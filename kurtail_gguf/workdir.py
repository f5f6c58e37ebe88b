"""The work directory: finished stages as checkpoints, and the settings they were made with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from kurtail_gguf.errors import KurtailError
from kurtail_gguf.files import write_atomically

_SETTINGS = "settings.json"


def open_work_dir(directory: Path, settings: Mapping[str, object]) -> bool:
    """Create the directory, or make sure that it belongs to a run with the same settings.

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
            write_atomically(path, json.dumps(wanted, indent=2, sort_keys=True) + "\n")
            return False
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KurtailError(f"work directory {directory} cannot be used: {error}") from error
    differing = [
        f"{key} was {found.get(key)}, is {wanted.get(key)}"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]
    if differing:
        raise KurtailError(
            f"{directory} holds a run with other settings ({'; '.join(differing)}): remove it, or give "
            "another --work-dir"
        )
    return True


@contextmanager
def filling(target: Path) -> Iterator[Path]:
    """A fresh directory to fill; it becomes ``target`` when the block ends without an error."""
    scratch = target.with_name(target.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    yield scratch
    os.replace(scratch, target)
