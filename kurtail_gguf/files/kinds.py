"""What a file is by its first bytes, where it is not what it should be: most often something else under its name."""

from __future__ import annotations

from pathlib import Path

from kurtail_gguf.messages.errors import KurtailError

GZIP = b"\x1f\x8b"
BOM = b"\xef\xbb\xbf"

_LFS = b"version https://git-lfs.github.com/spec/"
#: How files begin, and what is told of them where another kind was wanted. A longer beginning stands before a shorter.
_KINDS = (
    (_LFS, "a Git LFS pointer, not the file itself: run git lfs pull in its directory, or download the file"),
    (b"GGUF", "a GGUF file"),
    (b"PAR1", "a Parquet file"),
    (GZIP, "compressed with gzip: unpack it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it with unzstd"),
    (b"BZh", "compressed with bzip2: unpack it with bunzip2"),
    (b"\xfd7zXZ\x00", "compressed with xz: unpack it with unxz"),
    (b"PK\x03\x04", "a zip archive: unpack it"),
    (b"\xff\xfe\x00\x00", "UTF-32: convert it with iconv -f UTF-32 -t UTF-8"),
    (b"\x00\x00\xfe\xff", "UTF-32: convert it with iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "UTF-16: convert it with iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16: convert it with iconv -f UTF-16 -t UTF-8"),
)
_LONGEST = max(len(beginning) for beginning, _ in _KINDS)


def kind_of(path: Path) -> str | None:
    """What a file is that is no plain text, with a remedy where there is one; None for what is not known.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return kind_of_bytes(file.read(_LONGEST))


def kind_of_bytes(head: bytes) -> str | None:
    """The same of a file that begins with these bytes."""
    return next((told for beginning, told in _KINDS if head.startswith(beginning)), None)


def refuse_pointer(path: Path, error: type[KurtailError]) -> None:
    """Refuse what ``git clone`` without Git LFS leaves in the place of a large file. A missing file is none."""
    if begins_with(path, _LFS):
        raise error(f"{path} is {kind_of_bytes(_LFS)}")


def begins_with(path: Path, beginning: bytes) -> bool:
    """Whether a file begins with these bytes; one that cannot be read does not, and whoever reads it says why that fails."""
    try:
        with path.open("rb") as file:
            return file.read(len(beginning)) == beginning
    except OSError:
        return False
