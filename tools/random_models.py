"""Random models that speed is measured on: their shapes, and the one way to write their files. Standard library only."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from environment import ROOT, ToolError, say

#: ggml's number of a type that is measured, values and bytes of its block
TYPES = {"kt4": (164, 64, 34), "q4_0": (2, 32, 18), "q8_0": (8, 32, 34), "f16": (1, 1, 2)}

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


def quantize_model(program: Path, source: Path, path: Path, type_name: str) -> None:
    """A file of another type, made by llama-quantize with what it mixes.

    Args:
        program: llama-quantize of the build that will run the file.
        source: an f16 file.
        path: where it goes.
        type_name: as the program knows it; where a row does not fit into the type's blocks, it takes another.
    """
    if not program.is_file():
        raise ToolError(f"{path.name} needs {program}, which does not exist: build it beside llama-bench")
    say(f"writing {path.name}")
    part = path.with_suffix(".part")
    done = subprocess.run([program, source, part, type_name], text=True, capture_output=True)
    if done.returncode != 0:
        part.unlink(missing_ok=True)
        told = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise ToolError(f"{path.name}: {program} {type_name}: {told[-1]}")
    part.rename(path)


def main() -> int:
    """Write several at once, a process each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf-py", type=Path, required=True, help="gguf-py of the pinned source")
    parser.add_argument("--out", type=Path, required=True, help="output directory")
    parser.add_argument("models", nargs="+", metavar="SHAPE:TYPE")
    args = parser.parse_args()
    wanted = [model.split(":") for model in args.models]
    with ThreadPoolExecutor(min(len(wanted), os.cpu_count() or 1)) as pool:
        for path in pool.map(lambda model: write_model(Path(sys.executable), args.out, *model, args.gguf_py), wanted):
            print(path, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
