"""Files that a command writes beside its tables."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kurtail_gguf.messages.errors import KurtailError


def check_writable(path: Path, option: str) -> None:
    """Refuse a path that cannot be written, before any work; the message names the option."""
    parent = path.absolute().parent
    if path.is_dir() or not os.access(path if path.exists() else parent, os.W_OK):
        raise KurtailError(f"cannot write {path}: the directory does not exist or is not writable; choose another {option}")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as indented JSON; NaN is a defect, not a value."""
    text = json.dumps(content, indent=2, allow_nan=False)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise KurtailError(f"cannot write {path}: {error.strerror}") from None
