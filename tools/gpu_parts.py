"""A bundle in parts: payloads (archives of files) one after another, cut where a part is full. Standard library only."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from pathlib import Path

from environment import ToolError

LAYOUT = "bundle.json"  # in each part: what is in which
MIB = 2**20


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def pack(payloads: dict[str, Path], bundle: Path, size: int) -> dict:
    """Cut archives into parts.

    Args:
        payloads: archives by name, in the order in which they are needed.
        bundle: directory of the parts, emptied first.
        size: most bytes of a part.

    Returns:
        The layout: {"payloads": {name: sha256}, "parts": [[{"payload", "file", "bytes", "sha256", "last"}]]}.
    """
    shutil.rmtree(bundle, ignore_errors=True)
    layout: dict = {"payloads": {}, "parts": [[]]}
    room = size - 64 * 1024  # for the layout itself
    left = room
    for name, archive in payloads.items():
        layout["payloads"][name] = digest(archive)
        remaining, number = archive.stat().st_size, 0
        with archive.open("rb") as f:
            while remaining:
                if left < min(remaining, MIB):  # no crumbs
                    layout["parts"].append([])
                    left = room
                n = min(remaining, left)
                part = bundle / f"part{len(layout['parts'])}"
                part.mkdir(parents=True, exist_ok=True)
                piece = part / f"{name}.{number:02d}"
                with piece.open("wb") as out:
                    _copy(f, out, n)
                remaining, left, number = remaining - n, left - n, number + 1
                layout["parts"][-1].append({"payload": name, "file": piece.name, "bytes": n, "sha256": digest(piece), "last": remaining == 0})
    for number in range(1, len(layout["parts"]) + 1):
        (bundle / f"part{number}" / LAYOUT).write_text(json.dumps(layout, indent=1) + "\n")
    return layout


def _copy(source, target, size: int) -> None:
    while size:
        chunk = source.read(min(size, 1 << 20))
        target.write(chunk)
        size -= len(chunk)


def read_layout(bundle: Path, part: int | None) -> dict:
    """The layout, from a part (default: the first).

    Raises:
        ToolError: when the part is not there.
    """
    path = bundle / f"part{part or 1}" / LAYOUT
    if not path.is_file():
        raise ToolError(f"{path} is missing: create it with tools/gpu_bundle and copy the part here")
    return json.loads(path.read_text())


def completed(layout: dict, part: int | None) -> set[str]:
    """Payloads that are whole with a part; all of them for None."""
    parts = layout["parts"] if part is None else [layout["parts"][part - 1]]
    return {piece["payload"] for pieces in parts for piece in pieces if piece["last"]}


def unpack(bundle: Path, layout: dict, part: int | None, work: Path) -> None:
    """Keep a part's pieces (default: all parts'), and unpack the payloads that are whole. A part may be sent twice.

    Raises:
        ToolError: when a piece is missing or damaged, or an earlier part was not unpacked.
    """
    kept = work / "pieces"
    kept.mkdir(parents=True, exist_ok=True)
    for number in range(1, len(layout["parts"]) + 1) if part is None else [part]:
        for piece in layout["parts"][number - 1]:
            path = bundle / f"part{number}" / piece["file"]
            if not path.is_file() or digest(path) != piece["sha256"]:
                raise ToolError(f"{path} is {'damaged' if path.is_file() else 'missing'}: copy part {number} again")
            shutil.copyfile(path, kept / piece["file"])
            if piece["last"]:
                _unpack_payload(piece["payload"], layout, kept, work)


def _unpack_payload(name: str, layout: dict, kept: Path, work: Path) -> None:
    archive = kept / f"{name}.tar.xz"
    with archive.open("wb") as out:
        for number, pieces in enumerate(layout["parts"], 1):
            for piece in (piece for piece in pieces if piece["payload"] == name):
                path = kept / piece["file"]
                if not path.is_file():
                    raise ToolError(f"{name} is incomplete: unpack part {number} first")
                with path.open("rb") as source:
                    shutil.copyfileobj(source, out, 1 << 22)
    if digest(archive) != layout["payloads"][name]:
        raise ToolError(f"{name} belongs to another bundle: copy all parts again")
    with tarfile.open(archive) as tar:
        tar.extractall(work, filter="data")
    archive.unlink()
