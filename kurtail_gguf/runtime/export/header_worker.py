"""Worker of :func:`kurtail_gguf.runtime.gguf_info.write_header`: a GGUF file's keys without its tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf

from kurtail_gguf.runtime import vendored


def copy_keys(request: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
    """Write every key of ``path`` to ``out``."""
    vendored.assert_vendored(gguf)
    reader = gguf.GGUFReader(request["path"])
    # the writer adds general.architecture by itself
    writer = gguf.GGUFWriter(Path(request["out"]), reader.fields["general.architecture"].contents())
    for name in reader.fields:
        if not name.startswith("GGUF.") and name != "general.architecture":
            copy_key(reader, name, writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    # a list of no tensors ends the file as the format wants it
    writer.write_tensors_to_file()
    writer.close()


def copy_key(reader: gguf.GGUFReader, name: str, writer: gguf.GGUFWriter) -> None:
    """Add a key of one file, with its type, to another."""
    field = reader.fields[name]
    is_array = field.types[0] == gguf.GGUFValueType.ARRAY
    writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if is_array else None)


if __name__ == "__main__":
    vendored.serve(copy_keys)
