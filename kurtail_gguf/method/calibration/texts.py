"""Calibration texts: text and jsonl files, Parquet, directories and datasets of the Hugging Face hub.

Text and JSON files are read here, since an error must name a line, and lines may differ in what else they hold; whatever
else ``datasets`` knows is left to it, which is installed for ``hf:NAME`` anyway and brings pyarrow.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from kurtail_gguf.files.atomic import file_sha256
from kurtail_gguf.files.kinds import refuse_pointer
from kurtail_gguf.files.texts import read_text
from kurtail_gguf.messages.errors import CalibrationError

#: Fields that a row's text is looked for in, in this order: a text, a chat, a text.
FIELDS = ("text", "messages", "content")
_CHAT = "messages"
_HUB = "hf:"
_JSON = (".jsonl", ".json")
#: What datasets calls the formats of single files that it reads.
_FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
#: A text's kind as the messages call it.
_WHAT = "calibration text"

#: Makes the text of a chat, a list of messages with role and content.
Render = Callable[[list[Any]], str]


def no_template(messages: list[Any]) -> str:
    """For texts that hold no chats.

    Raises:
        ValueError: always.
    """
    raise ValueError("the tokenizer of the model has no chat template")


def chat_template(tokenizer: Any) -> Render:
    """Texts of chats as the model's own template writes them, with the special tokens of the turns."""
    if not getattr(tokenizer, "chat_template", None):
        return no_template
    return lambda messages: tokenizer.apply_chat_template(messages, tokenize=False)


def read_texts(sources: tuple[str, ...], render: Render = no_template) -> Iterator[str]:
    """Documents, one by one, from each source in turn.

    Args:
        sources: paths of text files (a file is one document), JSON lines (``.jsonl``, ``.json``), either compressed with
            gzip; Parquet, Arrow and CSV files; directories that the ``datasets`` library reads, their train split; or
            ``hf:NAME`` / ``hf:NAME:CONFIG`` (the train split, streamed). A row has its text in the field ``text`` or
            ``content``, or a chat in ``messages``.
        render: makes the text of a chat.

    Raises:
        CalibrationError: a file that is missing, not UTF-8, not JSON, has a row without a text or with half a surrogate pair,
            or a dataset that cannot be had; the message names file and line or row.
    """
    for source in sources:
        path = Path(source)
        if source.startswith(_HUB):
            rows = _rows(lambda source=source: _from_hub(source.removeprefix(_HUB)), source)
        elif path.is_dir():
            rows = _rows(lambda path=path: _from_directory(path), source)
        elif path.suffix in _FORMATS:
            rows = _rows(lambda path=path: _from_file(path), source)
        elif path.name.removesuffix(".gz").endswith(_JSON):
            rows = _from_json(path)
        else:
            yield _checked(read_text(path, CalibrationError, _WHAT, unpack=True), source)
            continue
        for where, row in rows:
            yield _checked(_text(row, where, render), where)


def check_texts(sources: tuple[str, ...]) -> None:
    """Read the first document of each source, but of those from the hub: what is no text at all is refused before any work.

    Raises:
        CalibrationError: as :func:`read_texts`; a source without a document.
    """
    for source in sources:
        if not source.startswith(_HUB) and not next(read_texts((source,), lambda messages: "a chat"), "").strip():
            raise CalibrationError(f"{_WHAT} {source} is empty")


def texts_sha256(source: str) -> str:
    """Hex digest of a file's bytes, or of the names and digests of all files in a directory.

    Raises:
        CalibrationError: it is not there or cannot be read.
    """
    path = Path(source)
    if not path.exists():
        raise CalibrationError(f"{_WHAT} {path} does not exist")
    if not path.is_dir():
        return file_sha256(path, _WHAT, CalibrationError)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            digest.update(f"{file.relative_to(path)} {file_sha256(file, _WHAT, CalibrationError)}\n".encode())
    return digest.hexdigest()


def _from_json(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows with the line that each is at; a file that is one array has numbers of its elements instead."""
    text = read_text(path, CalibrationError, _WHAT, unpack=True)
    if text.lstrip().startswith("["):
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(_parsed(text, str(path)), 1))
        return
    # not splitlines: U+2028, U+2029 and U+0085 may stand in a string as they are
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", _parsed(line, f"{path}:{number}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where}: not JSON ({error}): JSON lines files have one object per line") from error


def _text(row: Any, where: str, render: Render) -> str:
    if not isinstance(row, Mapping):
        raise CalibrationError(f"{where}: not a JSON object with one of the fields {', '.join(FIELDS)}")
    field = next((name for name in FIELDS if row.get(name) is not None), None)
    if field is None:
        held = ", ".join(map(str, row))[:80] or "nothing"
        raise CalibrationError(f"{where}: has none of the fields {', '.join(FIELDS)}; its fields are {held}")
    value = row[field]
    if field == _CHAT:
        return _chat(value, where, render)
    if not isinstance(value, str):
        raise CalibrationError(f"{where}: field {field!r} is not a string")
    return value


def _chat(messages: Any, where: str, render: Render) -> str:
    if not isinstance(messages, list) or not messages or not all(isinstance(one, Mapping) and "role" in one for one in messages):
        raise CalibrationError(f"{where}: field {_CHAT!r} is not a list of objects with role and content")
    try:
        return render(messages)
    except Exception as error:  # a template is a program of the model's, which may refuse a chat in any way
        raise CalibrationError(
            f"{where}: the chat in {_CHAT!r} cannot be turned into text ({type(error).__name__}: {error}): give rows with "
            f"the field {FIELDS[0]!r}"
        ) from error


def _checked(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{where}: character {error.start} of the text is half a surrogate pair (\\u{ord(text[error.start]):04x}), "
            "which is not a character: write the whole pair, or leave it out"
        ) from None
    return text


def _rows(read: Callable[[], Iterator[Any]], source: str) -> Iterator[tuple[str, Any]]:
    """What ``datasets`` reads, with the number of each row."""
    number = 0
    try:
        for number, row in enumerate(read(), 1):
            yield f"{source}: row {number}", row
    except CalibrationError:
        raise
    except Exception as error:  # network, hub and format errors of every kind, all outside our hands
        at = f" after row {number}" if number else ""
        raise CalibrationError(f"{source} cannot be read{at}: {type(error).__name__}: {error}") from error


def _from_file(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise CalibrationError(f"{_WHAT} {path} does not exist")
    refuse_pointer(path, CalibrationError)
    yield from _datasets().load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train", streaming=True)


def _from_directory(path: Path) -> Iterator[Any]:
    for file in path.rglob("*"):
        refuse_pointer(file, CalibrationError)
    datasets = _datasets()
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():  # of save_to_disk
        loaded = datasets.load_from_disk(str(path))
        yield from loaded["train"] if isinstance(loaded, datasets.DatasetDict) else loaded
        return
    builder = datasets.load_dataset_builder(str(path))
    if hasattr(builder.config, "sample_by"):  # text files, which it would cut into lines
        builder = datasets.load_dataset_builder(str(path), sample_by="document")
    yield from builder.as_streaming_dataset(split="train")


def _from_hub(name: str) -> Iterator[Any]:
    path, _, config = name.partition(":")
    yield from _datasets().load_dataset(path, config or None, split="train", streaming=True)


def _datasets() -> ModuleType:
    """The library, without bars and messages of its own: errors are raised, and told in our words."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    return datasets
