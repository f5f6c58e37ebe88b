"""Files that are asked for: refused before any work where they cannot be written, or would take another's place."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from kurtail_gguf.messages.errors import ConfigError, KurtailError


def check_out(out: Path, name: str = "OUT") -> None:
    """Refuse an OUT (or what ``name`` is) that cannot be written, before any work.

    Raises:
        KurtailError: OUT is a directory, or its parent is missing or not writable.
    """
    if out.is_dir():
        raise KurtailError(f"{name} {out} is a directory: give a file name")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise KurtailError(f"{name} {out} cannot be written: {parent} is not a directory; create it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise KurtailError(f"{name} {out} cannot be written: no permission to write in {parent}")


def check_apart(written: Mapping[str, Path | None], read: Iterable[tuple[str, Path]]) -> None:
    """Refuse a file to write that is another one, or one that is read; links are followed.

    Args:
        written: by what they are to the user; None where there is none.
        read: what it is to the user, and the path.

    Raises:
        ConfigError: with both.
    """
    taken = {os.path.realpath(path): name for name, path in read}
    for name, path in written.items():
        if path is not None and (other := taken.setdefault(os.path.realpath(path), name)) != name:
            raise ConfigError(f"{name} {path} is the same path as {other}: give another name")
