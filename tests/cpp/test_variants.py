"""Kernels for other instruction sets than this machine's best: the same test, ARM's under an emulator."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
X86 = platform.machine() in ("x86_64", "AMD64")


@dataclass(frozen=True)
class Variant:
    """An instruction set: the options of ggml's build, and the emulator where this machine cannot run it."""

    options: tuple[str, ...]
    emulator: tuple[str, ...] = ()


def _x86(*features: str) -> Variant:
    return Variant(tuple(f"-DGGML_{feature}=ON" for feature in features))


def _arm(architecture: str) -> Variant:
    compilers = "-DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc", "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++"
    system = "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"
    return Variant(
        (*system, *compilers, f"-DGGML_CPU_ARM_ARCH={architecture}"),
        ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"),
    )


VARIANTS = {
    "x86-sse4.2": _x86("SSE42"),  # portable kernels
    "x86-avx2": _x86("SSE42", "AVX", "F16C", "FMA", "BMI2", "AVX2"),
    "arm-dotprod": _arm("armv8.2-a+dotprod+fp16"),
    "arm-i8mm": _arm("armv8.2-a+dotprod+fp16+i8mm"),
}


def _missing(variant: Variant) -> str | None:
    """Why a variant cannot be tested here, with the remedy."""
    if not variant.emulator:
        return None if X86 else "not an x86 machine"
    if X86 and all(shutil.which(program) for program in ("aarch64-linux-gnu-g++", variant.emulator[0])):
        return None
    return "apt-get install g++-aarch64-linux-gnu qemu-user"


@pytest.mark.parametrize("name", VARIANTS)
def test_kernels_agree_with_the_reference(name: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    if reason := _missing(variant):
        pytest.skip(reason)
    upstream = Path(os.environ["KURTAIL_BUILD_DIR"]) / "upstream"
    options = (f"-DUPSTREAM_DIR={upstream.resolve()}", *variant.options)
    _run("cmake", "-G", "Ninja", "-S", ROOT / "tests" / "variants", "-B", tmp_path, *options)
    _run("cmake", "--build", tmp_path, "--target", "test-kt4")
    (program,) = tmp_path.rglob("test-kt4")
    answer = _run(*variant.emulator, program)
    checks = re.fullmatch(r"(\d+) checks, 0 failures", answer.splitlines()[-1])
    assert checks and int(checks[1]) > 1000, answer[-2000:]


def _run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout
