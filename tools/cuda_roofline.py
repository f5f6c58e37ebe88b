#!/usr/bin/env python3
"""Instructions of the loops that multiply prompts, ours and stock's Q4_0, counted in SASS the same way. No GPU needed.

A fragment is 16 x 8 x 64 products. The step of a kernel is its smallest loop with both matrix instructions and copies from
global memory: all it does for these products but a tile's beginning and end. Needs nvcc, nvdisasm (pip install
nvidia-cuda-nvdisasm) and, for stock's kernel, cuBLAS's header (pip install nvidia-cublas).
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cuda_kernels import ARCHITECTURES, INCLUDES, SOURCE, compile_cubin, find_nvcc
from environment import ROOT, ToolError, build_dir

FRAGMENT = 16 * 8 * 64
SCHEDULERS = 4  # of a multiprocessor, an instruction a clock each

# the large tiles of src/cuda/kt4-gemm.h by the units' names in mangled ones
OURS = {"kt4 s4": "gemm_configILi128ELi128ELi2ELi2ELb1E", "kt4 s8": "gemm_configILi128ELi128ELi4ELi2ELb0E"}

# mul_mat_q of tiles of 128 columns, rows a multiple of 128: what launch_mul_mat_q takes for long prompts
STOCK = """\
#include "mmq.cuh"
template __global__ void mul_mat_q<GGML_TYPE_Q4_0, 128, false>(
    const char *, const int *, const int32_t *, const int32_t *, float *, float *, const float *, const uint3, const int, const int, const int,
    const int, const int, const uint3, const uint3, const int, const int, const int, const uint3, const uint3, const int, const int, const int, const uint3);
"""


@dataclass(frozen=True)
class Step:
    """A kernel's loop over values: instructions of a warp by name, and fragments they multiply."""

    instructions: Counter[str]
    fragments: float

    @property
    def each(self) -> float:
        """Instructions a fragment."""
        return self.instructions.total() / self.fragments

    @property
    def bound(self) -> float:
        """Products a clock and multiprocessor that issuing them allows at most."""
        return FRAGMENT * SCHEDULERS / self.each


def products(instruction: str) -> int:
    """Products of a matrix instruction, 0 for others: IMMA.16864.S4.S4 is 16 x 8 x 64."""
    size = re.match(r"IMMA\.(16|8)8(\d\d)\.", instruction)
    return int(size[1]) * 8 * int(size[2]) if size else 0


def functions(sass: str) -> dict[str, str]:
    """Code of each kernel in what ``nvdisasm -c`` prints, by mangled name."""
    parts = re.split(r"^\s*\.section\s+\.text\.(\S+?),.*$", sass, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def step(code: str) -> Step:
    """The smallest loop with matrix instructions and copies.

    Raises:
        ToolError: when there is none.
    """
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(names)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\S+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", line):
            target = re.search(r"\((\.L\w+)\)", found[2]) if found[1].startswith("BRA") else None
            if target and target[1] in labels:
                loops.append((labels[target[1]], len(names) + 1))
            names.append(found[1])
    bodies = [names[begin:end] for begin, end in loops]
    steps = [body for body in bodies if any(map(products, body)) and any(name.startswith(("LDGSTS", "LDG.")) for name in body)]
    if not steps:
        raise ToolError("no loop with matrix instructions and copies")
    body = min(steps, key=len)
    return Step(Counter(name.split(".")[0] for name in body), sum(map(products, body)) / FRAGMENT)


def disassemble(nvcc: str, source: Path, arch: int, includes: list[Path]) -> dict[str, str]:
    """Kernels of a source file, compiled with ggml-cuda's options."""
    nvdisasm = shutil.which("nvdisasm")
    if nvdisasm is None:
        raise ToolError("nvdisasm is missing: install a CUDA toolkit, or pip install nvidia-cuda-nvdisasm and put it on the PATH")
    with tempfile.TemporaryDirectory() as tmp:
        cubin = Path(tmp) / "kernels.cubin"
        compile_cubin(nvcc, arch, source, includes, cubin, "-extended-lambda")
        return functions(subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout)


def steps(nvcc: str, arch: int, ggml: Path, cublas: Path) -> dict[str, Step]:
    """Ours that the architecture runs, and stock's."""
    found = {}
    ours = disassemble(nvcc, SOURCE, arch, INCLUDES)
    for name, tile in OURS.items():
        if name != "kt4 s4" or arch < 90:  # no such units there
            found[name] = step(next(code for mangled, code in ours.items() if tile in mangled))
    with tempfile.TemporaryDirectory() as tmp:
        source = Path(tmp) / "stock.cu"
        source.write_text(STOCK)
        includes = [ggml / "src" / "ggml-cuda", ggml / "src", ggml / "include", ROOT / "cpp_patches" / "src", cublas]
        stock = disassemble(nvcc, source, arch, includes)
    found["q4_0 stock"] = step(next(code for mangled, code in stock.items() if "mul_mat_q" in mangled))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, nargs="*", default=[80, 86, 89, 90, 120])
    parser.add_argument("--ggml", type=Path, help="upstream's ggml directory (default: that of the build in this checkout)")
    parser.add_argument("--cublas", type=Path, help="directory of cublas_v2.h (default: nvcc's)")
    args = parser.parse_args()
    nvcc = find_nvcc()
    ggml = args.ggml or build_dir() / "upstream" / "vendor" / "llama.cpp" / "ggml"
    cublas = args.cublas or Path(nvcc).resolve().parents[1] / "include"
    print("| | instructions per fragment | products per clock at most | the most frequent |\n|---|---|---|---|")
    for arch in args.arch:
        for name, counted in steps(nvcc, arch, ggml, cublas).items():
            frequent = ", ".join(f"{what} {n / counted.fragments:.1f}" for what, n in counted.instructions.most_common(6))
            print(f"| sm_{arch} {name} | {counted.each:.1f} | {counted.bound:.0f} | {frequent} |", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ToolError as e:
        sys.exit(f"error: {e}")
