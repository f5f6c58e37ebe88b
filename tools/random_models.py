"""Random models that speed is measured on: their shapes, and the one way to write their files. Standard library only."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from environment import ROOT, ToolError, say

SHAPES = {
    "tiny": {"hidden": 256, "ffn": 512, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocab": 1024},
    "smollm2-135m": {"hidden": 576, "ffn": 1536, "layers": 30, "heads": 9, "kv_heads": 3, "head_dim": 64, "vocab": 49152},
    "1b": {"hidden": 2048, "ffn": 8192, "layers": 16, "heads": 32, "kv_heads": 8, "head_dim": 64, "vocab": 49152},
    "7b": {"hidden": 4096, "ffn": 11008, "layers": 32, "heads": 32, "kv_heads": 32, "head_dim": 128, "vocab": 32000},
}


def write_model(python: Path, directory: Path, shape: str, kind: str, gguf_py: Path) -> Path:
    """The file of a shape and type, written where it is not there yet.

    Args:
        python: one that has numpy and what gguf needs.
        directory: made where it is missing.
        shape: of SHAPES.
        kind: a type of tools/bench_model.py.
        gguf_py: the pinned source's, which knows kt4.
    """
    path = directory / f"{shape}-{kind}.gguf"
    if path.exists():
        return path
    directory.mkdir(parents=True, exist_ok=True)
    say(f"writing {path.name}")
    part = path.with_suffix(".part")
    request = json.dumps({"path": str(part), "kind": kind, "shape": SHAPES[shape]})
    done = subprocess.run([python, ROOT / "tools" / "bench_model.py"], input=request, text=True, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(gguf_py)})  # fmt: skip
    if done.returncode != 0:
        part.unlink(missing_ok=True)
        raise ToolError(f"{path.name}: {done.stderr.strip().splitlines()[-1]}")
    part.rename(path)
    return path
