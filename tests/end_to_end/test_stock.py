"""Beside the unpatched build of the same pin: every other type behaves as before, and ours is refused there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

LOGITS = """
import json, sys
import numpy as np
import llama_cpp
cache = {name: int(value) for name, value in (option.split("=") for option in sys.argv[3:])}
model = llama_cpp.Llama(sys.argv[1], n_ctx=128, n_threads=2, n_threads_batch=2, logits_all=True, verbose=False, **cache)
model.eval(list(range(5, 69)))   # a prompt, then single tokens: both paths
for token in range(8):
    model.eval([token + 100])
np.save(sys.argv[2], np.asarray(model.scores[: model.n_tokens]))
print(json.dumps({"lib": str(llama_cpp.llama_cpp._lib._name)}))
"""


@pytest.fixture(scope="module")
def stock() -> Path:
    """Directory of the unpatched libraries."""
    directory = os.environ.get("KURTAIL_STOCK_DIR")
    if directory is None:
        pytest.skip("KURTAIL_STOCK_DIR is not set: run the tests with tools/test, which builds the peer")
    return Path(directory)


def logits(model: Path, libraries: Path | None, out: Path, *cache: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "LLAMA_CPP_LIB_PATH"}
    if libraries is not None:
        environment["LLAMA_CPP_LIB_PATH"] = str(libraries)
    command = [sys.executable, "-c", LOGITS, str(model), str(out), *cache]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def both_logits(model: Path, stock: Path, directory: Path, *cache: str) -> tuple[np.ndarray, np.ndarray]:
    """Ours and stock's."""
    ours, theirs = logits(model, None, directory / "a.npy", *cache), logits(model, stock, directory / "b.npy", *cache)
    assert ours.returncode == 0 and theirs.returncode == 0, ours.stderr + theirs.stderr
    a, b = (json.loads(done.stdout.splitlines()[-1])["lib"] for done in (ours, theirs))
    assert str(stock) in b and str(stock) not in a  # two libraries indeed
    found, expected = np.load(directory / "a.npy"), np.load(directory / "b.npy")
    assert np.isfinite(found).all() and found.shape == expected.shape
    return found, expected


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_1", "F16"])
def test_stock_files_give_the_same_logits(stock, program, tiny_reference, tmp_path, kind) -> None:
    quantized = tmp_path / "stock.gguf"
    done = program("llama-quantize", "--allow-requantize", tiny_reference, quantized, kind)
    assert done.status == 0, done.stderr[-2000:]
    found, expected = both_logits(quantized, stock, tmp_path)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("rotation", ["hadamard", "none"])
def test_a_file_for_stock_runs_there_and_here_alike(stock, converted, tiny_spm, tmp_path, rotation) -> None:
    path = converted(tiny_spm, "--rotation", rotation, "--weights", "rtn", "--target", "stock")
    found, expected = both_logits(path, stock, tmp_path)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("rotation", ["hadamard", "none"])
def test_attention_over_a_q4_0_cache_is_stocks_up_to_rounding(stock, converted, tiny_spm, tmp_path, rotation) -> None:
    """Our kernel adds up in another order; where that carries a value across the edge of two codes, more differs."""
    path = converted(tiny_spm, "--rotation", rotation, "--weights", "rtn", "--target", "stock")
    # type_k and type_v: q4_0 is 2; V in it needs flash attention
    found, expected = both_logits(path, stock, tmp_path, "type_k=2", "type_v=2", "flash_attn=1")
    error = np.sqrt(np.square(found - expected).mean() / expected.var())
    assert error < 0.005, error


def test_stock_refuses_our_file(stock, converted, tiny_spm, tmp_path) -> None:
    done = logits(converted(tiny_spm, "--rotation", "hadamard", "--weights", "rtn"), stock, tmp_path / "none.npy")
    assert done.returncode != 0
    verbose = LOGITS.replace("verbose=False", "verbose=True")
    path = converted(tiny_spm, "--rotation", "hadamard", "--weights", "rtn")
    told = subprocess.run(
        [sys.executable, "-c", verbose, str(path), str(tmp_path / "none.npy")],
        capture_output=True, text=True, env={**os.environ, "LLAMA_CPP_LIB_PATH": str(stock)}, check=False,
    )  # fmt: skip
    assert "has invalid ggml type 164" in told.stderr
