"""The C++ tests, upstream's and ours, as cases of this runner: ``ctest`` in the build that was installed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

REMEDY = "run the tests with tools/test, which builds them"


@pytest.fixture(scope="module")
def build_dir() -> Path:
    if "KURTAIL_BUILD_DIR" not in os.environ:
        pytest.fail(f"KURTAIL_BUILD_DIR is not set: {REMEDY}")
    directory = Path(os.environ["KURTAIL_BUILD_DIR"])
    if not (directory / "tests" / "cpp").is_dir():
        pytest.fail(f"{directory} holds no C++ tests: {REMEDY}")
    return directory


@pytest.mark.parametrize("name", ["kt4", "kt4-cuda", "kurtail-cache", "quantize-fns", "gguf", "backend-ops"])
def test_ctest(build_dir: Path, name: str) -> None:
    done = subprocess.run(
        ["ctest", "--test-dir", str(build_dir), "-R", f"^{name}$", "--no-tests=error", "--output-on-failure"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert "100% tests passed" in done.stdout


def test_upstreams_tests_cover_the_type(build_dir: Path) -> None:
    """Passing is not enough: each of upstream's tests has to have met the type."""
    fns = subprocess.run([build_dir / "bin" / "test-quantize-fns"], capture_output=True, text=True, check=True)
    assert "Testing kt4" in fns.stdout
    ops = subprocess.run(
        [build_dir / "bin" / "test-backend-ops", "test", "-b", "CPU", "-p", "kt4"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ops.returncode == 0, ops.stdout[-4000:]
    passed = [line for line in ops.stdout.splitlines() if "kt4" in line and "OK" in line]
    for operation in ("MUL_MAT(", "MUL_MAT_ID(", "GET_ROWS(", "SET_ROWS(", "CPY("):
        assert any(operation in line for line in passed), f"no {operation[:-1]} of kt4 was tested"
