"""Calibration texts: plain text files, jsonl files, datasets from the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from kurtail_gguf.messages.errors import CalibrationError

#: Text field of a jsonl line or a dataset's row.
FIELD = "text"
_HUB = "hf:"


def read_texts(sources: tuple[str, ...]) -> Iterator[str]:
    """Documents, one by one, from each source in turn.

    Args:
        sources: paths of text files (a file is one document), paths ending in ``.jsonl`` (a line is an
            object with the field ``text``), or ``hf:NAME`` / ``hf:NAME:CONFIG`` (the train split,
            streamed).

    Raises:
        CalibrationError: a file that is missing, not UTF-8 or not jsonl, or a dataset that cannot be
            had; the message names it.
    """
    for source in sources:
        if source.startswith(_HUB):
            yield from _from_hub(source.removeprefix(_HUB))
        elif source.endswith((".jsonl", ".json")):
            yield from _from_jsonl(Path(source))
        else:
            yield _read(Path(source))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CalibrationError(f"calibration text {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"calibration text {path} is not readable as UTF-8: {error}") from error


def _from_jsonl(path: Path) -> Iterator[str]:
    # not splitlines: U+2028, U+2029 and U+0085 may stand in a string as they are
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[FIELD]
        except (ValueError, KeyError, TypeError) as error:
            raise CalibrationError(
                f"{path}:{number}: not a JSON object with a field {FIELD!r} ({type(error).__name__})"
            ) from error
        if not isinstance(text, str):
            raise CalibrationError(f"{path}:{number}: field {FIELD!r} is not a string")
        yield text


def _from_hub(name: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError(
            f"hf:{name} needs the package datasets: pip install datasets, or give a text file"
        ) from None
    path, _, config = name.partition(":")
    try:
        for row in load_dataset(path, config or None, split="train", streaming=True):
            yield row[FIELD]
    except KeyError:
        raise CalibrationError(f"hf:{name}: its rows have no field {FIELD!r}") from None
    except Exception as error:  # network, hub and format errors of every kind, all outside our hands
        raise CalibrationError(f"hf:{name} cannot be read: {type(error).__name__}: {error}") from error
