"""What tools/gpu_check makes of the programs' output, and the script itself on a machine without a card."""

from __future__ import annotations

import importlib
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


def test_products_are_read_and_tabulated(report: ModuleType) -> None:
    times = report.product_times(PERF)
    assert times == {"4096x4096x512": {"kt4": 50.0, "q4_0": 125.5}}
    speeds = {"kt4": {"pp512": 300.0}, "q4_0": {"pp512": 100.0}}
    text = report.table({"card": "a card", "device": "CUDA0", "date": "2026-01-02", "products us": times, "tokens/s": speeds,
                         "logits": {"kld": 0.001, "top1": 99.0}}, "q4_0")  # fmt: skip
    assert "| 4096x4096x512 | 50 (2.51) | 125.5 (1.00) | 343.6 |" in text
    assert "| kt4 | 300 (3.00) |" in text and "KLD 0.001 nats, top-1 99.00 %" in text


def test_a_product_is_written_for_the_program(report: ModuleType) -> None:
    assert report.operation_numbers("enum ggml_op {\n GGML_OP_NONE = 0,\n GGML_OP_DUP, // GGML_OP_X\n GGML_OP_ADD,\n};")["GGML_OP_ADD"] == 2
    line = report.product_line(29, "kt4", 164, 64, 34, rows=8, inputs=128, columns=3)
    assert line == "29 0 8 3 1 1 0 2 164 128 8 1 1 34 68 544 544 0 128 3 1 1 4 512 1536 1536 product-kt4-8x128x3"


def test_divergence_is_read(report: ModuleType) -> None:
    text = "Mean    KLD:   0.001234 ±   0.000100\nMaximum KLD:   0.2\nSame top p: 98.765 ± 0.100 %\n"
    assert report.divergence(text) == {"kld": 0.001234, "top1": 98.765}
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
    assert lines[-3:] == ["| source | 1.0 | 1.0 | |", "| rotations | 2.0 | 40.0 | 1.50 |", "| perplexity of the file | 8.50 | 8.25 | |"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["cuda_build", "--arch", "70"], "--arch 70: the kernels need Turing"),
        (["cuda_build", "--arch", "86", "--wheels", "."], "no nvidia/*/include/cublas_v2.h"),
        (["gpu_check", "--bin", "nowhere/bin"], "--bin names the bin directory of a build"),
    ],
)
def test_bad_input_is_one_line(command: list[str], message: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, TOOLS / command[0], *command[1:]], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
