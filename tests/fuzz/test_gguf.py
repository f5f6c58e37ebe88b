"""The fuzzer's harness over its seeds and a few hundred damaged copies, with the runtime as it was built.

No sanitizer sees these runs, and nothing is learned from them: they keep harness, seeds and mutations working and
notice a crash. The search is ``tools/fuzz``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FUZZ = ROOT / "tests" / "fuzz"
MUTATIONS = 50  # of each seed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the harness keeps its file in a memfd, which is Linux's")


def _run(*command: object, **environment: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, errors="replace", check=False, env=env)


@pytest.fixture(scope="module")
def build_dir() -> Path:
    if "KURTAIL_BUILD_DIR" not in os.environ:
        pytest.fail("KURTAIL_BUILD_DIR is not set: run the tests with tools/test, which builds the runtime")
    return Path(os.environ["KURTAIL_BUILD_DIR"]).resolve()


@pytest.fixture(scope="module")
def seeds(build_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """``base.gguf`` first: the model that the adapter fits."""
    directory = tmp_path_factory.mktemp("seeds")
    done = _run(sys.executable, FUZZ / "seeds.py", directory, PYTHONPATH=build_dir / "upstream/vendor/llama.cpp/gguf-py")
    assert done.returncode == 0, done.stderr
    return sorted(directory.glob("*.gguf"), key=lambda path: (path.name != "base.gguf", path.name))


@pytest.fixture(scope="module")
def harness(build_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The harness with a main of its own, linked to the runtime's libraries."""
    program = tmp_path_factory.mktemp("harness") / "fuzz-gguf"
    upstream, libraries = build_dir / "upstream/vendor/llama.cpp", build_dir / "bin"
    done = _run(
        "c++", "-std=c++17", "-O1", "-DKURTAIL_STANDALONE", FUZZ / "fuzz-gguf.cpp", FUZZ / "mutate.cpp",
        f"-I{upstream}/include", f"-I{upstream}/ggml/include", f"-L{libraries}", f"-Wl,-rpath,{libraries}",
        "-lllama", "-lggml", "-lggml-base", "-o", program,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return program


def test_every_seed_loads(harness: Path, seeds: list[Path]) -> None:
    done = _run(harness, *seeds, KURTAIL_FUZZ_BASE=seeds[0])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [f"{path}: loaded" for path in seeds]


def test_an_adapter_for_other_rotations_is_refused(harness: Path, seeds: list[Path], tmp_path: Path) -> None:
    (adapter,) = (path for path in seeds if path.name == "adapter.gguf")
    other = tmp_path / "other.gguf"
    other.write_bytes(adapter.read_bytes().replace(b"0" * 63 + b"1", b"0" * 63 + b"2"))
    done = _run(harness, other, KURTAIL_FUZZ_BASE=seeds[0])
    assert "refused: " in done.stdout and "other rotations" in done.stdout


def test_damaged_copies_end_in_an_answer(harness: Path, seeds: list[Path]) -> None:
    done = _run(harness, "--mutate", MUTATIONS, *seeds, KURTAIL_FUZZ_BASE=seeds[0])
    assert done.returncode == 0, f"status {done.returncode}; the last line names file and seed:\n{done.stderr[-2000:]}"
    counts = re.findall(rf": {MUTATIONS} mutations, (\d+) loaded, (\d+) refused$", done.stdout, re.M)
    assert len(counts) == len(seeds)
    # mutations that are all refused, or none, damage too much or too little
    assert sum(int(loaded) for loaded, _ in counts) > len(seeds)
    assert all(int(refused) > MUTATIONS // 10 for _, refused in counts)
