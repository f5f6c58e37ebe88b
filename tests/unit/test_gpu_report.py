"""What tools/gpu_check makes of the programs' output, and the script itself on a machine without a card."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"

OPERATIONS = """\
Testing 2 devices
Backend 1/2: CUDA0
  Device description: a card
  MUL_MAT(type_a=kt4,type_b=f32,m=16,n=1,k=256): \x1b[1;32mOK\x1b[0m
  MUL_MAT(type_a=kt4,type_b=f16,m=16,n=1,k=256): not supported [CUDA0]
[MUL_MAT_ID] NMSE = 0.5 > 0.0005   MUL_MAT_ID(type_a=kt4,n_mats=4): \x1b[1;31mFAIL\x1b[0m
  GET_ROWS(type=kt4,n=256): \x1b[1;31mFAIL\x1b[0m
  1/3 tests passed
"""

PERF = """\
  MUL_MAT(name=product-kt4-4096x4096x512,type=f32,ne=[4096,512,1,1],op_params=[],sources=kt4[4096,4096,1,1],f32[4096,512,1,1]): 8192 runs -    50.00 us/run - 368 kB/run - \x1b[1;34m   2.39 GB/s\x1b[0m
  MUL_MAT(name=product-q4_0-4096x4096x512,type=f32,ne=[4096,512,1,1],op_params=[],sources=q4_0[4096,4096,1,1],f32[4096,512,1,1]): 8192 runs -   125.50 us/run - 368 kB/run - 2.39 GB/s
"""


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("gpu_report")


def test_operations_are_counted(report: ModuleType) -> None:
    assert report.backend_ops_summary(OPERATIONS, "CUDA0") == {"ok": 1, "failed": 2, "unsupported": 1}


def test_a_missing_device_is_an_error(report: ModuleType) -> None:
    with pytest.raises(Exception, match="ran nothing on CUDA0: 0/0 backends passed"):
        report.backend_ops_summary("Testing 1 devices\n  Skipping\n0/0 backends passed\n", "CUDA0")


@pytest.mark.parametrize(
    ("text", "status", "errors", "told"),
    [
        ("  GET_ROWS(type=kt4,n=256): OK\n", -6, "CUDA error: misaligned address\n#1 abort\n",
         "ended by SIGABRT, 1 passed: CUDA error: misaligned address"),
        ("Backend 1/1: CUDA0\n", -9, "", "ended by SIGKILL, 0 passed: Backend 1/1: CUDA0"),
        ("  GET_ROWS(type=kt4,n=256): OK\n", 1, "out of memory\n", "ended by status 1, 1 passed: out of memory"),
    ],
)  # fmt: skip
def test_operations_that_end_early_are_an_error(report: ModuleType, text, status, errors, told) -> None:
    with pytest.raises(Exception, match=told):
        report.backend_ops_summary(text, "CUDA0", status, errors)


def test_a_failed_case_explains_its_status(report: ModuleType) -> None:
    assert report.backend_ops_summary(OPERATIONS, "CUDA0", 1)["failed"] == 2


def test_products_are_read_and_tabulated(report: ModuleType) -> None:
    times = report.product_times(PERF)
    assert times == {"4096x4096x512": {"kt4": 50.0, "q4_0": 125.5}}
    speeds = {"kt4": {"pp512": 300.0}, "q4_0": {"pp512": 100.0}}
    text = report.table({"card": "a card", "device": "CUDA0", "date": "2026-01-02", "products us": times, "tokens/s": speeds,
                         "logits": {"kld": 0.001, "loss": -0.002, "top1": 99.0}}, "q4_0")  # fmt: skip
    assert "| 4096x4096x512 | 50 (2.51) | 125.5 (1.00) | 343.6 |" in text
    assert "| kt4 | 300 (3.00) |" in text
    assert "KLD 0.001 nats (at most 0.5), loss -0.002 (±0.1), top-1 99.00 %" in text


def test_a_product_is_written_for_the_program(report: ModuleType) -> None:
    assert report.operation_numbers("enum ggml_op {\n GGML_OP_NONE = 0,\n GGML_OP_DUP, // GGML_OP_X\n GGML_OP_ADD,\n};")["GGML_OP_ADD"] == 2
    line = report.product_line(29, "kt4", 164, 64, 34, rows=8, inputs=128, columns=3)
    assert line == "29 0 8 3 1 1 0 2 164 128 8 1 1 34 68 544 544 0 128 3 1 1 4 512 1536 1536 product-kt4-8x128x3"


def test_divergence_is_read(report: ModuleType) -> None:
    text = "Mean ln(PPL(Q)/PPL(base))     :  -0.000321 ±   0.000100\n"
    text += "Mean    KLD:   0.001234 ±   0.000100\nMaximum KLD:   0.2\nSame top p: 98.765 ± 0.100 %\n"
    assert report.divergence(text) == {"kld": 0.001234, "loss": -0.000321, "top1": 98.765}
    with pytest.raises(Exception, match="no divergence"):
        report.divergence("")


def test_learning_is_tabulated_by_stage(report: ModuleType) -> None:
    assert report.perplexity("[1]9.1,[2]8.2\nFinal estimate: PPL = 8.1234 +/- 0.5\n") == 8.1234
    with pytest.raises(Exception, match="no perplexity"):
        report.perplexity("[1]9.1,[2]8.2\n")
    peaks = {"stages": {"rotations": {"allocated": 1.0e9, "reserved": 1.5e9}}}
    card = {"seconds": {"source": 1.0, "rotations": 2.0}, "card_peak_bytes": peaks, "perplexity": 8.5}
    result = {"card": "a card", "device": "CUDA0", "date": "2026-01-02", "products us": report.product_times(PERF),
              "tokens/s": {"kt4": {"pp512": 300.0}, "q4_0": {"pp512": 100.0}},
              "learning": {"card": card, "cpu": {"seconds": {"source": 1.0, "rotations": 40.0}, "perplexity": 8.25}}}  # fmt: skip
    lines = report.table(result, "q4_0").splitlines()
    assert lines[-3:-1] == ["| source | 1.0 | 1.0 | |", "| rotations | 2.0 | 40.0 | 1.50 |"]
    assert lines[-1] == "| perplexity of the file (at most 20 % apart) | 8.50 | 8.25 | |"


@pytest.mark.parametrize(
    ("failed", "kld", "loss", "card", "told"),
    [
        (0, 0.4, -0.09, 9.5, []),
        (2, 0.4, 0.0, 8.0, ["2 operations differ from the CPU's: test-backend-ops test -b CUDA0"]),
        (0, 0.6, 0.0, 8.0, ["logits: KLD 0.6 nats"]),
        (0, 0.4, 0.2, 8.0, ["logits: loss +0.200"]),
        (0, 0.4, 0.0, 9.7, ["learning: perplexity 9.70 learned on the card, 8.00 on the CPU"]),
        (1, 2.0, -0.2, 6.0, ["1 operations", "logits: KLD", "logits: loss -0.200", "learning: perplexity 6.00"]),
    ],
)
def test_what_is_beyond_its_limit_is_told(report: ModuleType, failed, kld, loss, card, told) -> None:
    result = {"device": "CUDA0", "operations": {"kt4": {"ok": 5, "failed": failed, "unsupported": 0}},
              "logits": {"kld": kld, "loss": loss, "top1": 90.0},
              "learning": {"card": {"perplexity": card}, "cpu": {"perplexity": 8.0}}}  # fmt: skip
    found = report.complaints(result)
    assert len(found) == len(told) and all(one.startswith(start) for one, start in zip(found, told, strict=True)), found


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """A build whose test-backend-ops passes its tests and cannot measure."""
    header = tmp_path / "build" / "upstream" / "vendor" / "llama.cpp" / "ggml" / "include" / "ggml.h"
    header.parent.mkdir(parents=True)
    header.write_text("enum ggml_op {\n GGML_OP_NONE = 0,\n GGML_OP_MUL_MAT,\n};")
    program = tmp_path / "build" / "bin" / "test-backend-ops"
    program.parent.mkdir()
    perf = "[ $1 = perf ] && { echo no memory >&2; exit 3; }"
    program.write_text(f"#!/bin/sh\n{perf}\necho '  GET_ROWS(type=kt4,n=256): OK'\n")
    program.chmod(0o755)
    return program.parent


def _gpu_check(build: Path) -> subprocess.CompletedProcess:
    options = ["--bin", build, "--device", "CPU", "--shape", "tiny", "--out", build.parent / "out"]
    command = [sys.executable, TOOLS / "gpu_check", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_was_measured_before_a_failure_is_kept(build: Path) -> None:
    done = _gpu_check(build)
    assert done.returncode == 1 and done.stderr == "error: test-backend-ops: no memory\n", done.stderr
    kept = json.loads((build.parent / "out" / "gpu-check.json").read_text())
    assert kept["operations"]["kt4"] == {"ok": 1, "unsupported": 0, "failed": 0} and "products us" not in kept


def test_operations_that_abort_end_the_call(build: Path) -> None:
    with (build / "test-backend-ops").open("a") as program:
        program.write("echo 'CUDA error: an illegal memory access' >&2\nkill -ABRT $$\n")
    done = _gpu_check(build)
    assert done.returncode == 1
    told = "test-backend-ops on CPU ended by SIGABRT, 1 passed: CUDA error: an illegal memory access"
    assert done.stderr == f"error: {told}\n"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["cuda_build", "--arch", "70"], "--arch 70: the kernels need Turing"),
        (["cuda_build", "--arch", "86", "--wheels", "."], "no nvidia/*/include/cublas_v2.h"),
        (["gpu_check", "--bin", "nowhere/bin"], "--bin names the bin directory of a build"),
        (["gpu_check", "--text", "nothing.txt"], "--text nothing.txt is not there"),
        (["gpu_check", "--learn", "m", "--text", str(TOOLS / "quickstart")], "--learn needs about 20480 (4096 tokens)"),
    ],
)
def test_bad_input_is_one_line(command: list[str], message: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, TOOLS / command[0], *command[1:]], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
