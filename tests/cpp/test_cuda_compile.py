"""The CUDA kernels, their test for a GPU and the files of ggml-cuda that we hook into compile; ptxas spills nothing. No GPU
is needed.

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


# a step with an inner loop, in a loop over tiles
SASS = """\
	.section	.text._Z4gemmv,"ax",@progbits
	.sectioninfo	@"SHI_REGISTERS=128"
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @!P2 LDGSTS.E.BYPASS.128 [R31], [R8.64] ;
.L_x_2:
        /*0020*/                   IMMA.16864.S4.S4 R60, R84.ROW, R62.COL, R44 ;
        /*0030*/                   FFMA.FTZ R99, R28.reuse, R50, R29.reuse ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/                   IMMA.16832.S8.S8 R60, R84.ROW, R62.COL, R44 ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/                   STG.E [R8.64], R31 ;
        /*0080*/               @P0 BRA `(.L_x_0) ;
        /*0090*/                   EXIT ;
"""


@pytest.fixture
def cuda_roofline(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("cuda_roofline")


def test_a_steps_instructions_are_counted(cuda_roofline: ModuleType) -> None:
    step = cuda_roofline.step(cuda_roofline.functions(SASS)["_Z4gemmv"])
    assert step.instructions == {"LDGSTS": 1, "IMMA": 2, "FFMA": 1, "BRA": 2}
    assert (step.fragments, step.each, step.bound) == (1.5, 4.0, 8192.0)
    with pytest.raises(cuda_roofline.ToolError, match="no loop"):
        cuda_roofline.step(SASS.replace("IMMA", "MOV"))


@pytest.fixture
def cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("cuda_kernels")


def test_the_report_is_read(cuda_kernels: ModuleType) -> None:
    spilling, clean = cuda_kernels.parse(REPORT, 86)
    assert (spilling.name, spilling.registers, spilling.spills, spilling.threads) == ("gemm 128x128 s4", 128, 948, 256)
    assert (clean.name, clean.registers, clean.spills) == ("gemv 3, as in the file", 56, 0)
    assert spilling.blocks == 2 and spilling.occupancy == pytest.approx(16 / 48)


@needs_nvcc
@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90, 120])
def test_no_kernel_spills(cuda_kernels: ModuleType, arch: int) -> None:
    found = {kernel.name: kernel for kernel in cuda_kernels.kernels(NVCC, arch)}
    tiles = {f"gemm {size} {unit}" for size in ("128x128", "64x64", "64x32") for unit in ("s4", "s8")}
    vectors = {f"gemv {columns}{layout}" for columns in range(1, 9) for layout in ("", ", as in the file")}
    others = {"quantize A4 packed", "quantize A4 bytes", "quantize A8 bytes", "hadamard", "repack into groups", "repack out of groups"}
    assert set(found) == tiles | vectors | others
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
    """For one architecture; tools/gpu_bundle compiles and links the whole library."""
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


@needs_nvcc
@pytest.mark.parametrize("code", ["arch=compute_90,code=sm_90", "arch=compute_80,code=[compute_80,sm_90]"], ids=["sm_90", "int4 kernels for sm_90"])
def test_the_kernels_test_is_built_for_a_gpu(tmp_path: Path, code: str) -> None:
    """It links and starts: without a GPU it says so in one line and passes nothing."""
    build = Path(os.environ["KURTAIL_BUILD_DIR"])
    ggml = build / "upstream" / "vendor" / "llama.cpp" / "ggml"
    source, program = ROOT / "tests" / "cpp" / "test-kt4-gpu.cu", tmp_path / "test-kt4-gpu"
    includes = [f"-I{path}" for path in (ggml / "src", ggml / "include", ROOT / "cpp_patches" / "src", ROOT / "cpp_patches" / "src" / "cuda")]
    library = next(build.rglob("libggml-base.so"))
    # as in tests/cpp/CMakeLists.txt, without optimization: what is tested is that it is all there
    command = [NVCC, "-std=c++17", "-O0", "-Xptxas", "-O1", "-use_fast_math", "-gencode", code, *includes, "-o", program, source, library, "-cudart", "static"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "", "LD_LIBRARY_PATH": str(library.parent)}
    ran = subprocess.run([program], capture_output=True, text=True, check=False, env=hidden)
    assert ran.returncode == 1 and ran.stdout.startswith("FAILED: CUDA error: device: "), ran.stdout + ran.stderr
