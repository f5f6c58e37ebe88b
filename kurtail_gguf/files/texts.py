"""UTF-8 texts; what is given in the place of one is told by what it is, before anything is computed with it."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from kurtail_gguf.files.kinds import BOM, GZIP, kind_of, kind_of_bytes
from kurtail_gguf.messages.errors import KurtailError

#: Bytes that are decoded at a time: a text may be larger than memory.
_CHUNK = 1 << 20


def check_text(path: Path, error: type[KurtailError], what: str = "text") -> None:
    """Read a text to its end.

    Args:
        path: the file.
        error: what to raise.
        what: it is called in the message.

    Raises:
        error: missing, empty, compressed, not UTF-8, or with NUL, which no text holds; the message names file and remedy.
    """
    with _readable(path, error, what):
        if (kind := kind_of(path)) is not None:
            raise error(f"{what} {path} is {kind}; a plain UTF-8 text is needed")
        with path.open("rb") as file:
            if not any([part.strip() for part in _decoded(file, path, error, what)]):
                raise error(f"{what} {path} is empty")


def read_text(path: Path, error: type[KurtailError], what: str = "text", unpack: bool = False) -> str:
    """A whole text, without the byte order mark that some editors begin one with.

    Args:
        path: the file.
        error: what to raise.
        what: it is called in the message.
        unpack: take a file that gzip has compressed, too.

    Raises:
        error: as :func:`check_text`, but for an empty text; a damaged gzip.
    """
    with _readable(path, error, what), path.open("rb") as file:
        packed = unpack and file.read(len(GZIP)) == GZIP
        file.seek(0)
        with gzip.open(file) if packed else contextlib.nullcontext(file) as plain:
            head = plain.read(64)
            if (kind := kind_of_bytes(head)) is not None:
                raise error(f"{what} {path} is {kind}; a plain UTF-8 text is needed")
            return "".join(_decoded(plain, path, error, what, head)).removeprefix("\ufeff")


@contextlib.contextmanager
def without_mark(path: Path) -> Iterator[Path]:
    """The text for a program that would take a byte order mark for text: itself, or a copy without, as long as the context is open."""
    with path.open("rb") as file:
        if file.read(len(BOM)) != BOM:
            yield path
            return
        with tempfile.TemporaryDirectory(prefix="kurtail-text-") as directory:
            copy = Path(directory) / path.name
            with copy.open("wb") as target:
                shutil.copyfileobj(file, target)
            yield copy


def _decoded(file: BinaryIO, path: Path, error: type[KurtailError], what: str, head: bytes = b"") -> Iterator[str]:
    """The rest of a file in pieces, behind ``head``, which was read from it."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    data, last = head, False
    while not last:
        more = file.read(_CHUNK)
        data, last = data + more, not more
        if (zero := data.find(0)) >= 0:
            raise error(f"{what} {path} is not text: byte {done + zero} is NUL; a plain UTF-8 text is needed")
        held = len(decoder.getstate()[0])
        try:
            yield decoder.decode(data, last)
        except UnicodeDecodeError as problem:
            raise error(
                f"{what} {path} is not UTF-8: {problem.reason} at byte {done - held + problem.start}; convert it, with iconv for "
                "example"
            ) from None
        done += len(data)
        data = b""


@contextlib.contextmanager
def _readable(path: Path, error: type[KurtailError], what: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise error(f"{what} {path} does not exist") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as problem:
        raise error(f"{what} {path} is a truncated or damaged gzip file ({problem}): download it again") from None
    except OSError as problem:
        raise error(f"cannot read {what} {path}: {problem.strerror or problem}") from None
