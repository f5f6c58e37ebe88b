"""Worker of :func:`kurtail_gguf.runtime.export.write_adapter`: matrices from a safetensors file into a GGUF adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
from safetensors.numpy import load_file

from kurtail_gguf.runtime import vendored


def write(request: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
    """Write ``out``; the layout is upstream's (convert_lora_to_gguf.py), with our mark (docs/format.md)."""
    vendored.assert_vendored(gguf)
    out = Path(request["out"])
    writer = gguf.GGUFWriter(out, request["architecture"])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    # 0: B is scaled already
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
    writer.add_string("kurtail.tool", request["tool"])
    writer.add_string("kurtail.adapter.rotations", request["rotations"])
    for name, values in sorted(load_file(request["tensors"]).items()):
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    vendored.serve(write)
