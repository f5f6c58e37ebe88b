"""Beside the unpatched build of the same pin: every other type behaves as before, and ours is refused there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LOGITS = """
import hashlib, json, sys
import numpy as np
import llama_cpp
cache = {name: int(value) for name, value in (option.split("=") for option in sys.argv[2:])}
model = llama_cpp.Llama(sys.argv[1], n_ctx=128, n_threads=2, n_threads_batch=2, logits_all=True, verbose=False, **cache)
model.eval(list(range(5, 69)))   # a prompt, then single tokens: both paths
for token in range(8):
    model.eval([token + 100])
scores = np.asarray(model.scores[: model.n_tokens])
print(json.dumps({"lib": str(llama_cpp.llama_cpp._lib._name), "shape": scores.shape, "finite": bool(np.isfinite(scores).all()),
                  "sha256": hashlib.sha256(scores.tobytes()).hexdigest()}))
"""


@pytest.fixture(scope="module")
def stock() -> Path:
    """Directory of the unpatched libraries."""
    directory = os.environ.get("KURTAIL_STOCK_DIR")
    if directory is None:
        pytest.skip("KURTAIL_STOCK_DIR is not set: run the tests with tools/test, which builds the peer")
    return Path(directory)


def logits(model: Path, libraries: Path | None, *cache: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "LLAMA_CPP_LIB_PATH"}
    if libraries is not None:
        environment["LLAMA_CPP_LIB_PATH"] = str(libraries)
    return subprocess.run([sys.executable, "-c", LOGITS, str(model), *cache], capture_output=True, text=True, env=environment, check=False)


def assert_same_logits(model: Path, stock: Path, *cache: str) -> None:
    ours, theirs = logits(model, None, *cache), logits(model, stock, *cache)
    assert ours.returncode == 0 and theirs.returncode == 0, ours.stderr + theirs.stderr
    a, b = json.loads(ours.stdout.splitlines()[-1]), json.loads(theirs.stdout.splitlines()[-1])
    assert a["finite"] and a["shape"] == b["shape"]
    assert str(stock) in b["lib"] and str(stock) not in a["lib"]  # two libraries indeed
    assert a["sha256"] == b["sha256"]


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_1", "F16"])
def test_stock_files_give_the_same_logits(stock, program, tiny_reference, tmp_path, kind) -> None:
    quantized = tmp_path / "stock.gguf"
    done = program("llama-quantize", "--allow-requantize", tiny_reference, quantized, kind)
    assert done.status == 0, done.stderr[-2000:]
    assert_same_logits(quantized, stock)


# type_k and type_v: q4_0 is 2; V in it needs flash attention
@pytest.mark.parametrize("cache", [(), ("type_k=2", "type_v=2", "flash_attn=1")], ids=["default cache", "q4_0 cache"])
@pytest.mark.parametrize("rotation", ["hadamard", "none"])
def test_a_file_for_stock_runs_there_and_here_alike(stock, converted, tiny_spm, rotation, cache) -> None:
    assert_same_logits(converted(tiny_spm, "--rotation", rotation, "--weights", "rtn", "--target", "stock"), stock, *cache)


def test_stock_refuses_our_file(stock, converted, tiny_spm) -> None:
    done = logits(converted(tiny_spm, "--rotation", "hadamard", "--weights", "rtn"), stock)
    assert done.returncode != 0
    verbose = LOGITS.replace("verbose=False", "verbose=True")
    told = subprocess.run(
        [sys.executable, "-c", verbose, str(converted(tiny_spm, "--rotation", "hadamard", "--weights", "rtn"))],
        capture_output=True, text=True, env={**os.environ, "LLAMA_CPP_LIB_PATH": str(stock)}, check=False,
    )  # fmt: skip
    assert "has invalid ggml type 164" in told.stderr
