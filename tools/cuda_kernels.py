#!/usr/bin/env python3
"""What ptxas reports about the CUDA kernels: registers, spills, shared memory, occupancy. No GPU needed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from environment import ROOT, ToolError

ARCHITECTURES = (75, 80, 86, 89, 90, 120)
SOURCE = ROOT / "tests" / "cpp" / "kt4-kernels.cu"
INCLUDES = [ROOT / "cpp_patches" / "src" / "cuda"]


@dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor of an architecture holds (CUDA programming guide, "Technical Specifications per Compute
    Capability"): resident warps, registers, bytes of shared memory."""

    warps: int
    shared: int
    registers: int = 65536


MULTIPROCESSORS = {
    75: Multiprocessor(32, 64 * 1024),
    80: Multiprocessor(64, 164 * 1024),
    86: Multiprocessor(48, 100 * 1024),
    89: Multiprocessor(48, 100 * 1024),
    90: Multiprocessor(64, 228 * 1024),
    120: Multiprocessor(48, 100 * 1024),
}


@dataclass(frozen=True)
class Kernel:
    """A kernel of one architecture. ``name`` as in "gemm 128x128 s4", spills and stack in bytes a thread."""

    name: str
    arch: int
    threads: int
    registers: int
    spills: int
    stack: int
    shared: int

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor holds at once; 1 KiB of shared memory a block is the system's from sm_80 on."""
        sm = MULTIPROCESSORS[self.arch]
        warps = self.threads // 32
        registers = -(-self.registers // 8) * 8 * 32 * warps
        shared = self.shared + (1024 if self.arch >= 80 else 0)
        return min(sm.warps // warps, sm.registers // registers, sm.shared // shared if shared else sm.warps)

    @property
    def occupancy(self) -> float:
        """Share of the multiprocessor's warps that are resident."""
        return self.blocks * (self.threads // 32) / MULTIPROCESSORS[self.arch].warps

    def row(self) -> dict:
        """For tables and JSON."""
        return asdict(self) | {"blocks": self.blocks, "occupancy": self.occupancy}


def parse(report: str, arch: int) -> list[Kernel]:
    """Kernels in what ``nvcc -Xptxas -v`` prints."""
    kernels = []
    for name, body in re.findall(r"Compiling entry function '(\S+)'(.*?)(?=Compiling entry function|\Z)", report, flags=re.S):
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", body).groups())
        registers = int(re.search(r"Used (\d+) registers", body)[1])
        readable, threads, shared = _describe(name)
        kernels.append(Kernel(readable, arch, threads, registers, stores + loads, stack, shared))
    return kernels


def _describe(mangled: str) -> tuple[str, int, int]:
    """Readable name, threads of a block, bytes of shared memory that it is launched with."""
    if tile := re.search(r"gemm_configILi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)ELb([01])E", mangled):
        bm, bn, wm, wn, packed = map(int, tile.groups())
        # as gemm_config in src/cuda/kt4-gemm.h: two stages of weights, their scales, activations and theirs
        step = 2 if packed else 1
        shared = 2 * (step * bm * 34 + bn * 64 + step * bn * 8)
        return f"gemm {bm}x{bn} {'s4' if packed else 's8'}", wm * wn * 32, shared
    if columns := re.search(r"kt4_gemv_groupsILi(\d+)E", mangled):
        return f"gemv {columns[1]}", 256, 8 * 16 * 4 * int(columns[1])  # GROUP_WARPS sums of 16 rows
    if columns := re.search(r"kt4_gemvILi(\d+)E", mangled):
        return f"gemv {columns[1]}, as in the file", 128, 0
    if into := re.search(r"kt4_repackILb([01])E", mangled):
        return f"repack {'into' if into[1] == '1' else 'out of'} groups", 256, 0
    if form := re.search(r"kt4_quantizeILi(\d)ELb([01])E", mangled):
        return f"quantize A{form[1]} {'packed' if form[2] == '1' else 'bytes'}", 128, 0
    if "kt4_hadamard" in mangled:
        return "hadamard", 128, 0
    return mangled, 32, 0


def compile_cubin(nvcc: str, arch: int, source: Path, includes: list[Path], cubin: Path, *options: str) -> str:
    """Compile a source file for one architecture with ggml-cuda's options, and more; returns what nvcc says.

    Raises:
        ToolError: when nvcc fails, with its first lines.
    """
    command = [nvcc, "-std=c++17", "-O3", "-use_fast_math", f"-arch=sm_{arch}", *options, *(f"-I{path}" for path in includes),
               "-cubin", "-o", str(cubin), str(source)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise ToolError(f"nvcc for sm_{arch}: " + " | ".join(done.stderr.strip().splitlines()[:3]))
    return done.stderr


def kernels(nvcc: str, arch: int) -> list[Kernel]:
    """Compile our kernels for one architecture.

    Raises:
        ToolError: when nvcc does, with its first lines.
    """
    with tempfile.TemporaryDirectory() as tmp:
        return parse(compile_cubin(nvcc, arch, SOURCE, INCLUDES, Path(tmp) / "kernels.cubin", "-Xptxas", "-v"), arch)


def find_nvcc() -> str:
    """nvcc, or a ToolError that says how to get it."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise ToolError("nvcc is missing: install a CUDA toolkit (12.8 or later), or pip install nvidia-cuda-nvcc and put it on the PATH")
    return nvcc


def main() -> int:
    nvcc = find_nvcc()
    print("| | threads | KiB | " + " | ".join(f"sm_{arch}" for arch in ARCHITECTURES) + " |")
    print("|---" * (3 + len(ARCHITECTURES)) + "|")
    found = [{kernel.name: kernel for kernel in kernels(nvcc, arch)} for arch in ARCHITECTURES]
    for name, first in sorted(found[0].items()):
        cells = [f"{k.registers}, {k.blocks} ({k.occupancy:.0%})" + (f", spills {k.spills}" if k.spills else "") for k in (by_name[name] for by_name in found)]
        print(f"| {name} | {first.threads} | {first.shared / 1024:.1f} | " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ToolError as e:
        sys.exit(f"error: {e}")
