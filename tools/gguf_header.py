"""The header of a GGUF file: what of it is where, and 32-bit values changed in place. Standard library only."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from environment import ToolError

UINT32, STRING, ARRAY = 4, 8, 9
#: bytes of a value, by GGUF's number of its type
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


@dataclass(frozen=True)
class Value:
    """A key's value: GGUF's number of its type (of its elements, where it is an array), where it begins and ends in the file,
    and for an array how many elements it has; they begin 12 bytes after it."""

    kind: int
    begin: int
    end: int
    count: int | None


@dataclass(frozen=True)
class Header:
    """``values`` by key; ``tensors``: of each name its dimensions (inputs first), ggml's number of its type and where its bytes
    begin."""

    values: dict[str, Value]
    tensors: dict[str, tuple[tuple[int, ...], int, int]]
    alignment: int


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def number(self, form: str) -> int:
        value = struct.unpack_from("<" + form, self.data, self.at)[0]
        self.at += struct.calcsize(form)
        return value

    def text(self) -> str:
        size = self.number("Q")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def skip(self, kind: int) -> None:
        if kind == STRING:
            self.text()
        elif kind == ARRAY:
            kind, n = self.number("I"), self.number("Q")
            if kind in SIZES:
                self.at += n * SIZES[kind]
                return
            for _ in range(n):
                self.skip(kind)
        else:
            self.at += SIZES[kind]


def read_header(path: Path) -> Header:
    """Of a little-endian GGUF file of version 3.

    Raises:
        ToolError: when it is none.
    """
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:8] != b"GGUF\x03\0\0\0":
            raise ToolError(f"{path} is not a GGUF file of version 3")
        reader = _Reader(data)
        reader.at = 8
        n_tensors, n_values = reader.number("Q"), reader.number("Q")
        values: dict[str, Value] = {}
        found, alignment = {}, 32
        for _ in range(n_values):
            key, kind = reader.text(), reader.number("I")
            begin, count = reader.at, None
            if key == "general.alignment":
                alignment = struct.unpack_from("<I", data, begin)[0]
            reader.skip(kind)
            if kind == ARRAY:
                kind, count = struct.unpack_from("<IQ", data, begin)
            values[key] = Value(kind, begin, reader.at, count)
        for _ in range(n_tensors):
            name = reader.text()
            shape = tuple(reader.number("Q") for _ in range(reader.number("I")))
            found[name] = (shape, reader.number("I"), reader.number("Q"))
        begin = -(-reader.at // alignment) * alignment
    return Header(values, {name: (shape, kind, begin + offset) for name, (shape, kind, offset) in found.items()}, alignment)


def set_uint32(path: Path, changes: dict[str, int]) -> None:
    """Overwrite values of a file that has these keys, each of type uint32.

    Raises:
        ToolError: when a key is missing or of another type; nothing is written then.
    """
    values = read_header(path).values
    for key in changes:
        if key not in values or (values[key].kind, values[key].count) != (UINT32, None):
            raise ToolError(f"{path}: {key} is {'of another type' if key in values else 'missing'}, expected a uint32")
    with path.open("r+b") as f:
        for key, value in changes.items():
            f.seek(values[key].begin)
            f.write(struct.pack("<I", value))


def multiplied_bytes(path: Path, kind: int, values: int, size: int) -> int:
    """Bytes of the file's matrices of a type whose rows are a multiple of 16: those that the GPU holds in groups.

    Args:
        path: the file.
        kind: ggml's number of the type.
        values: of its block.
        size: of its block, in bytes.
    """
    total = 0
    for shape, found, _ in read_header(path).tensors.values():
        if found == kind and len(shape) > 1 and shape[1] % 16 == 0:
            count = 1
            for n in shape:
                count *= n
            total += count // values * size
    return total


def _elements(data: mmap.mmap, value: Value) -> list[str] | list[bytes]:
    """An array's elements: strings, or the bytes of anything else of a fixed size."""
    reader = _Reader(data)
    reader.at = value.begin + 12
    if value.kind == STRING:
        return [reader.text() for _ in range(value.count or 0)]
    size = SIZES[value.kind]
    return [bytes(data[reader.at + i * size : reader.at + (i + 1) * size]) for i in range(value.count or 0)]


def _encoded(element: str | bytes) -> bytes:
    if isinstance(element, bytes):
        return element
    text = element.encode()
    return struct.pack("<Q", len(text)) + text


def first_layers(path: Path, out: Path, layers: int) -> None:
    """Write a file without the layers from `layers` on: the same weights, too few of them for roundings to add up.

    Arrays of numbers whose length is a multiple of the layers', other than the vocabulary's, are cut alike. Of arrays that tell
    something of tensors by name (`kurtail.online.name` and its neighbours) what is told of the other tensors is left out.

    Raises:
        ToolError: when the file's header does not count its layers.
    """
    header = read_header(path)
    counts = [key for key, value in header.values.items() if key.endswith(".block_count") and (value.kind, value.count) == (UINT32, None)]
    if not counts:
        raise ToolError(f"{path} does not contain its number of layers")
    ends = sorted([begin for _, _, begin in header.tensors.values()] + [path.stat().st_size])
    kept = {name: tensor for name, tensor in header.tensors.items() if not (name.startswith("blk.") and int(name.split(".")[1]) >= layers)}
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        whole = struct.unpack_from("<I", data, header.values[counts[0]].begin)[0]
        head = bytearray(data[:8]) + struct.pack("<QQ", len(kept), len(header.values))
        lists = {
            key.removesuffix("name"): [name in kept for name in _elements(data, value)]
            for key, value in header.values.items()
            if key.endswith(".name") and value.count is not None and value.kind == STRING
        }
        for key, value in header.values.items():
            head += struct.pack("<Q", len(key.encode())) + key.encode()
            content = data[value.begin : value.end]
            chosen = lists.get(key.rpartition(".")[0] + ".")
            if chosen is not None and value.count == len(chosen):
                left = [element for element, keep in zip(_elements(data, value), chosen, strict=True) if keep]
                head += struct.pack("<IIQ", ARRAY, value.kind, len(left)) + b"".join(map(_encoded, left))
                continue
            if value.count is None:
                head += struct.pack("<I", value.kind) + (struct.pack("<I", layers) if key in counts else content)
                continue
            if value.kind in SIZES and value.count and value.count % whole == 0 and not key.startswith("tokenizer."):
                count = value.count // whole * layers
                content = struct.pack("<IQ", value.kind, count) + content[12 : 12 + count * SIZES[value.kind]]
            head += struct.pack("<I", ARRAY) + content
        offset, places = 0, []
        for name, (shape, kind, begin) in kept.items():
            head += struct.pack("<Q", len(name.encode())) + name.encode() + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
            size = ends[ends.index(begin) + 1] - begin
            places.append((begin, size, offset))
            offset += -(-size // header.alignment) * header.alignment
        start = -(-len(head) // header.alignment) * header.alignment
        with out.open("wb") as to:
            to.write(head)
            for begin, size, offset in places:
                to.seek(start + offset)
                to.write(data[begin : begin + size])
