"""Builds the runtime with CUDA for a machine with a GPU that need not be this one: tools/gpu_bundle's first half."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from cuda_kernels import find_nvcc
from environment import ROOT, ToolError, run, say

TARGETS = ["llama-bench", "llama-perplexity", "test-backend-ops", "test-kt4-cuda"]
#: the toolkit's own version: cuBLAS has to be of the same major release
CUBLAS = "nvidia-cublas==13.0.2.14"
#: K and V types of the cache that attention has kernels for while generating; others are converted to f16 first
ATTENTION = ("q4_0-q4_0", "q8_0-q4_0", "q8_0-q8_0", "f16-f16")
#: library: CMake's variables for where it is
LIBRARIES = {
    "cublas": ["CUDA_cublas_LIBRARY"],
    "cublasLt": ["CUDA_cublasLt_LIBRARY"],
    "cudart": ["CUDA_cudart_LIBRARY", "CUDA_CUDART"],
}


def targets(arch: int | None) -> list[str]:
    """Programs to build. From Hopper on the int4 kernels are tested by a program of their own."""
    return TARGETS + (["test-kt4-gpu"] if arch else []) + (["test-kt4-gpu-ptx"] if arch and arch >= 90 else [])


def toolkit_of(nvcc: str) -> Path:
    """The directory of a toolkit's bin, include and lib64: nvcc itself may be a wrapper that lies elsewhere."""
    told = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True).stderr
    found = re.search(r"^#\$ TOP=(.+)$", told, flags=re.M)
    if found is None:
        raise ToolError(f"{nvcc} --dryrun does not name its toolkit: {told.strip().splitlines()[-1]}")
    return Path(found[1]).resolve()


def cublas(directory: Path, toolkit: Path) -> Path | None:
    """A directory with cuBLAS's ``include`` and ``lib``: None where the toolkit has it, else the wheel's, unpacked once.

    Raises:
        ToolError: when the wheel cannot be had.
    """
    if (toolkit / "include" / "cublas_v2.h").is_file():
        return None
    root = directory / "nvidia" / "cu13"
    if (root / "include" / "cublas_v2.h").is_file():
        return root
    say(f"downloading cuBLAS ({CUBLAS}, 0.4 GB)")
    wheels = directory.with_name(directory.name + "-wheel")
    run([sys.executable, "-m", "pip", "download", "--no-deps", "-d", wheels, CUBLAS], directory.with_name("pip-cublas.log"), CUBLAS)
    with zipfile.ZipFile(next(wheels.glob("nvidia_cublas-*.whl"))) as wheel:
        wheel.extractall(directory)
    shutil.rmtree(wheels)
    return root


def library_options(root: Path | None, toolkit: Path) -> list[str]:
    """CMake options for libraries that have no names without versions, which CMake looks for.

    Args:
        root: of the unpacked wheel; None where the toolkit has all.
        toolkit: nvcc's.
    """
    if root is None:
        return []
    options = [f"-DCMAKE_CUDA_FLAGS=-I{root / 'include'}"]
    for name, variables in LIBRARIES.items():
        found = [path for directory in (root / "lib", toolkit / "lib64", toolkit / "lib") for path in sorted(directory.glob(f"lib{name}.so*"))]
        if not found:
            raise ToolError(f"lib{name}.so is neither in {root / 'lib'} nor in {toolkit}/lib64: install the CUDA runtime of nvcc's version")
        options += [f"-D{variable}={found[0]}" for variable in variables]
    return options


def driver_functions(sources: list[str], header: str) -> list[str]:
    """Functions of the driver (cuda.h) that sources call, by the names the library exports them under."""
    renamed = dict(re.findall(r"^#define\s+(cu[A-Z]\w*)\s+(cu[A-Z]\w*(?:_v\d+|_ptsz))$", header, flags=re.M))
    declared = set(re.findall(r"\bCUDAAPI\s+(cu[A-Z]\w*)\(", header))
    called = {name for source in sources for name in re.findall(r"\b(cu[A-Z]\w*)\b", source)}
    return sorted(renamed.get(name, name) for name in called & (declared | set(renamed)))


def driver_stub(directory: Path, toolkit: Path, sources: list[Path]) -> Path:
    """A libcuda.so.1 to link with where no driver is: every function reports that there is no device. Never packed.

    With it ggml-cuda takes the memory pool that users get (virtual memory management), not the one for builds without
    a driver.
    """
    library = directory / "libcuda.so.1"
    header = (toolkit / "include" / "cuda.h").read_text()
    names = driver_functions([path.read_text() for path in sources], header)
    directory.mkdir(parents=True, exist_ok=True)
    source = directory / "cuda.c"
    text = "".join(f"int {name}(void) {{ return 100; }} /* CUDA_ERROR_NO_DEVICE */\n" for name in sorted({"cuInit", *names}))
    if not library.exists() or not source.exists() or source.read_text() != text:
        source.write_text(text)
        done = subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], capture_output=True, text=True)
        if done.returncode != 0:
            raise ToolError(f"the driver's stub does not compile: {done.stderr.strip().splitlines()[0]}")
    return library


def configure(directory: Path, arch: int | None) -> None:
    """CMake of the checkout: CPU code for any x86-64 with AVX2, and CUDA for one architecture; None: without."""
    options = [
        "-DGGML_NATIVE=OFF", *(f"-DGGML_{name}=ON" for name in ("SSE42", "AVX", "AVX2", "FMA", "F16C", "BMI2")), "-DLLAMA_OPENSSL=OFF",
        "-DKURTAIL_TESTS=ON", "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON", *(_cuda_options(directory, arch) if arch else ["-DGGML_CUDA=OFF"]),
    ]  # fmt: skip
    command = ["cmake", "-S", ROOT, "-B", directory, "-G", "Ninja", f"-DPython3_EXECUTABLE={sys.executable}", *options]
    run(command, directory.with_name(directory.name + "-configure.log"), "configure")


def _cuda_options(directory: Path, arch: int) -> list[str]:
    nvcc = find_nvcc()
    toolkit = toolkit_of(nvcc)
    # upstream's source is laid out first: the driver's stub has the functions that it calls
    source = directory / "upstream"
    prepared = subprocess.run([sys.executable, ROOT / "cpp_patches" / "prepare.py", "--out", source], capture_output=True, text=True)
    if prepared.returncode != 0:
        raise ToolError(prepared.stderr.strip().removeprefix("error: "))
    sources = sorted((source / "vendor" / "llama.cpp" / "ggml" / "src" / "ggml-cuda").glob("*.cu*"))
    stub = driver_stub(directory.with_name(directory.name + "-driver"), toolkit, sources)
    launcher = ["-DCMAKE_CUDA_COMPILER_LAUNCHER=ccache"] if shutil.which("ccache") else []
    return [
        "-DGGML_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={arch}-real", f"-DCMAKE_CUDA_COMPILER={nvcc}", *launcher,
        f"-DGGML_CUDA_FA_QUANTS={';'.join(ATTENTION)}", f"-DCUDA_cuda_driver_LIBRARY={stub}", "-DGGML_CUDA_NCCL=OFF",
        *library_options(cublas(directory.with_name("gpu-cublas"), toolkit), toolkit),
    ]  # fmt: skip


def build(directory: Path, names: list[str]) -> None:
    """Compile and link; ninja goes on where an earlier call was interrupted. Its log lies beside the directory."""
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    run(["cmake", "--build", directory, "-j", jobs, "--target", *names], directory.with_name(directory.name + "-build.log"), "runtime with CUDA")
