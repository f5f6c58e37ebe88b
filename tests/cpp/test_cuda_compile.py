"""The CUDA kernels and the files of ggml-cuda that we hook into compile; ptxas spills nothing. No card is needed.

What the kernels compute is tested by test-kt4-cuda, which needs no CUDA either.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not there: pip install nvidia-cuda-nvcc, or a CUDA toolkit of 13")

REPORT = """\
ptxas info    : Compiling entry function '_ZN4ggml4cuda3kt48kt4_gemmINS1_11gemm_configILi128ELi128ELi1ELi8ELb1EEEEEvNS1_9gemm_argsE' for 'sm_86'
ptxas info    : Function properties for _ZN4ggml4cuda3kt48kt4_gemmINS1_11gemm_configILi128ELi128ELi1ELi8ELb1EEEEEvNS1_9gemm_argsE
    264 bytes stack frame, 304 bytes spill stores, 644 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 264 bytes cumulative stack size, 488 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN4ggml4cuda3kt48kt4_gemvILi3EEEvNS1_9gemv_argsE' for 'sm_86'
ptxas info    : Function properties for _ZN4ggml4cuda3kt48kt4_gemvILi3EEEvNS1_9gemv_argsE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 56 registers, used 0 barriers, 480 bytes cmem[0]
"""


@pytest.fixture
def cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("cuda_kernels")


def test_the_report_is_read(cuda_kernels: ModuleType) -> None:
    spilling, clean = cuda_kernels.parse(REPORT, 86)
    assert (spilling.name, spilling.registers, spilling.spills, spilling.threads) == ("gemm 128x128 s4", 128, 948, 256)
    assert (clean.name, clean.registers, clean.spills) == ("gemv 3", 56, 0)
    assert spilling.blocks == 2 and spilling.occupancy == pytest.approx(16 / 48)


@needs_nvcc
@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90, 120])
def test_no_kernel_spills(cuda_kernels: ModuleType, arch: int) -> None:
    found = {kernel.name: kernel for kernel in cuda_kernels.kernels(NVCC, arch)}
    tiles = {"gemm 128x128 s4", "gemm 64x64 s4", "gemm 64x32 s4", "gemm 128x64 s8", "gemm 64x64 s8", "gemm 64x32 s8"}
    vectors = {f"gemv {columns}" for columns in range(1, 9)}
    assert set(found) == tiles | vectors | {"quantize A4 packed", "quantize A4 bytes", "quantize A8 bytes", "hadamard"}
    assert {name: (k.spills, k.stack) for name, k in found.items() if k.spills or k.stack} == {}
    for name in tiles:  # what __launch_bounds__ promises, with the shared memory that is asked for
        assert found[name].blocks >= (1 if arch == 75 else 2), found[name]


def _cublas() -> Path | None:
    """The directory of cublas_v2.h, of a toolkit or of NVIDIA's wheels."""
    near = [Path(NVCC).resolve().parents[1] / "include"] if NVCC else []
    wheels = [Path(os.environ["KURTAIL_CUDA_WHEELS"])] if "KURTAIL_CUDA_WHEELS" in os.environ else [Path(sysconfig.get_path("purelib"))]
    for directory in [*near, *(include for root in wheels for include in root.glob("nvidia/*/include"))]:
        if (directory / "cublas_v2.h").is_file():
            return directory
    return None


@needs_nvcc
def test_hooked_files_compile(tmp_path: Path) -> None:
    """For one architecture; tools/cuda_build compiles and links the whole library."""
    cublas = _cublas()
    if cublas is None:
        pytest.skip("cublas_v2.h is not there: pip install 'nvidia-cublas>=13,<14'")
    tree = Path(os.environ["KURTAIL_BUILD_DIR"]) / "upstream" / "vendor" / "llama.cpp" / "ggml"
    cuda = tree / "src" / "ggml-cuda"
    patch = (ROOT / "cpp_patches" / "patches" / "0008-ggml-cuda.patch").read_text()
    hooked = [cuda / name for name in re.findall(r"^\+\+\+ b/.*/ggml-cuda/(\S+\.cu)$", patch, flags=re.M)]
    assert len(hooked) == 5
    for source in [*hooked, *(ROOT / "cpp_patches" / "src" / "cuda").glob("*.cu")]:
        includes = [f"-I{path}" for path in (tree / "src", tree / "include", cuda, ROOT / "cpp_patches" / "src", cublas)]
        command = [NVCC, "-std=c++17", "-use_fast_math", "-extended-lambda", "-arch=sm_86", *includes, "-cubin", "-o", tmp_path / "x", source]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{source.name}: {done.stderr[-3000:]}"
