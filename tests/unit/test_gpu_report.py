"""What tools/gpu_run makes of the programs' output."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"

OPERATIONS = """\
Testing 2 devices
Backend 1/2: CUDA0
  Device description: a GPU
  MUL_MAT(type_a=kt4,type_b=f32,m=16,n=1,k=256): \x1b[1;32mOK\x1b[0m
  MUL_MAT(type_a=kt4,type_b=f32,m=16,n=16,k=256): not supported [CUDA0]
[MUL_MAT_ID] NMSE = 0.5 > 0.0005   MUL_MAT_ID(type_a=kt4,type_b=f32,n_mats=4,n=1,k=256): \x1b[1;31mFAIL\x1b[0m
  GET_ROWS(type=kt4,n=256): \x1b[1;31mFAIL\x1b[0m
  1/3 tests passed
"""

ATTENTION = "  FLASH_ATTN_EXT(hsk={0},hsv={0},nh=4,nr23=[4,1],kv={1},nb={2},mask=1,sinks=0,type_K=q4_0,type_V=q4_0,permute=[0,1,2,3]): {3}\n"

LOG = """\
0.00.325.053 I load_tensors:   CPU_Mapped model buffer size =    97.80 MiB
0.00.325.054 I load_tensors:    CUDA0_KT4 model buffer size =    53.79 MiB
0.00.325.054 I load_tensors:        CUDA0 model buffer size =    28.69 MiB
0.00.429.509 I sched_reserve: graph (pp bs=512, tg bs=1): nodes = 1266 / 1264, splits = {}, input objects = 4, input tensors = 7
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
    found = report.counts(report.backend_cases(OPERATIONS, "CUDA0", 1))
    assert found["MUL_MAT"] == {"ok": 1, "failed": 0, "unsupported": 1}
    assert found["MUL_MAT_ID"] == found["GET_ROWS"] == {"ok": 0, "failed": 1, "unsupported": 0}


def test_a_missing_device_is_an_error(report: ModuleType) -> None:
    with pytest.raises(Exception, match="ran nothing on CUDA0: 0/0 backends passed"):
        report.backend_cases("Testing 1 devices\n  Skipping\n0/0 backends passed\n", "CUDA0")


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
        report.backend_cases(text, "CUDA0", status, errors)


def test_products_have_to_run(report: ModuleType) -> None:
    """Everything that ran passed, and yet no product did: what the check before this one took for a pass."""
    cases = report.backend_cases("  MUL_MAT(type_a=kt4,type_b=f32,m=16,n=1,k=256): not supported [CUDA0]\n  GET_ROWS(type=kt4,n=256): OK\n", "CUDA0")
    wrong = report.case_complaints(cases, report.PRODUCTS, "CUDA0")
    assert "MUL_MAT, generation was not tested: it is not supported on CUDA0" in wrong
    assert "MUL_MAT, prompt was not tested: it has no case on CUDA0" in wrong
    assert not any(line.startswith("GET_ROWS") for line in wrong)
    assert len(wrong) == len(report.PRODUCTS) - 1


def test_failed_cases_are_named(report: ModuleType) -> None:
    (wrong,) = report.case_complaints(report.backend_cases(OPERATIONS, "CUDA0", 1), {}, "CUDA0")
    assert wrong.startswith("2 cases differ from the CPU's, the first: MUL_MAT_ID(type_a=kt4")


@pytest.mark.parametrize("missing", [(64, 512, 1), (128, 4096, 1), (256, 512, 1), (256, 512, 32)])
def test_attention_is_demanded_of_every_head_size(report: ModuleType, missing: tuple[int, int, int]) -> None:
    demanded = report.attention_cases("q4_0", "q4_0")
    shapes = [(size, kv, nb) for size in (64, 128, 256) for kv, nb in ((512, 1), (4096, 1), (512, 32))]
    whole = "".join(ATTENTION.format(*shape, "OK") for shape in shapes)
    assert report.case_complaints(report.backend_cases(whole, "CUDA0"), demanded, "CUDA0") == []
    what = "generation" if missing[2] == 1 else "prompt"
    # of a size either all of its cases for generation or for prompts are unsupported, or have another length of the cache
    lacking = "".join(ATTENTION.format(*shape, "not supported [CUDA0]" if shape[0] == missing[0] and shape[2] == missing[2] else "OK") for shape in shapes)
    (wrong,) = report.case_complaints(report.backend_cases(lacking, "CUDA0"), demanded, "CUDA0")
    assert wrong == f"heads of {missing[0]}, {what} was not tested: it is not supported on CUDA0"
    other = lacking.replace("q4_0", "q8_0")
    assert len(report.case_complaints(report.backend_cases(other, "CUDA0"), demanded, "CUDA0")) == len(demanded)


def test_caches_that_the_vector_kernel_does_not_take_do_not_count(report: ModuleType) -> None:
    cases = report.backend_cases(ATTENTION.format(128, 113, 1, "OK"), "CUDA0")
    assert any(line.startswith("heads of 128, generation") for line in report.case_complaints(cases, report.attention_cases("q4_0", "q4_0"), "CUDA0"))


def test_the_kernels_test_is_read(report: ModuleType) -> None:
    assert report.kernel_checks("NVIDIA H100\n812 checks, 0 failures\n", 0) == {"checks": 812, "failures": 0, "s4": 1}
    without = report.kernel_checks("s4: not tested, this build has no int4 matrix units\n5 checks, 2 failures\n", 1)
    assert without == {"checks": 5, "failures": 2, "s4": 0}
    with pytest.raises(Exception, match="ended by status 1: FAILED: CUDA error: launch: no kernel image"):
        report.kernel_checks("FAILED: CUDA error: launch: no kernel image is available\n", 1)
    with pytest.raises(Exception, match="ended by SIGSEGV: no output"):
        report.kernel_checks("", -11)
    with pytest.raises(Exception, match="checked nothing"):
        report.kernel_checks("0 checks, 0 failures\n", 0)


def test_the_sanitizers_count_is_read(report: ModuleType) -> None:
    assert report.sanitizer_errors("========= ERROR SUMMARY: 0 errors\n") == 0
    assert report.sanitizer_errors("========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)\n") == 3
    with pytest.raises(Exception, match="no summary: ========= Error: Device not supported"):
        report.sanitizer_errors("========= COMPUTE-SANITIZER\n========= Error: Device not supported\n")


def test_where_a_model_lies_is_read(report: ModuleType) -> None:
    found = report.placement(LOG.format("2"))
    assert found.weights == {"CPU_Mapped": 97.8, "CUDA0_KT4": 53.79, "CUDA0": 28.69} and found.splits == 2
    assert report.placement(LOG.format("2 / 3")).splits == 3
    with pytest.raises(Exception, match="does not contain"):
        report.placement("load_tensors: CUDA0 model buffer size = 1.00 MiB\n")


def test_weights_elsewhere_and_splits_are_complaints(report: ModuleType) -> None:
    size = int(53.79 * 2**20)
    assert report.placement_complaints(report.placement(LOG.format("2")), "CUDA0", size) == []
    (splits,) = report.placement_complaints(report.placement(LOG.format("2 / 62")), "CUDA0", size)
    assert "62 splits" in splits
    plain = LOG.format("2").replace("CUDA0_KT4", "CUDA0_XXX")
    (buffer,) = report.placement_complaints(report.placement(plain), "CUDA0", size)
    assert buffer.startswith("0.00 MiB of weights are in CUDA0_KT4, 53.79 MiB are expected")
    assert len(report.placement_complaints(report.placement(LOG.format("2")), "CUDA0", 2 * size)) == 1


def test_divergence_is_read_and_bounded(report: ModuleType) -> None:
    text = "Mean ln(PPL(Q)/PPL(base))     :  -0.000321 ±   0.000100\n"
    text += "Mean    KLD:   0.001234 ±   0.000100\nMaximum KLD:   0.2\nSame top p: 98.765 ± 0.100 %\n"
    assert report.divergence(text) == {"kld": 0.001234, "loss": -0.000321, "top1": 98.765}
    with pytest.raises(Exception, match="no divergence"):
        report.divergence("")
    limit = report.Limit(0.02, 0.01)
    assert report.divergence_complaints({"kld": 0.02, "loss": -0.01}, limit) == []
    assert len(report.divergence_complaints({"kld": 0.021, "loss": -0.011}, limit)) == 2
    assert len(report.divergence_complaints({"kld": math.nan, "loss": math.nan}, limit)) == 2


def test_learning_is_bounded(report: ModuleType) -> None:
    assert report.learning_complaints(9.5, 8.0) == [] == report.learning_complaints(8.0, 9.5)
    assert report.learning_complaints(9.7, 8.0)[0].startswith("perplexity 9.70 learned on the GPU, 8.00 on the CPU")
    assert report.perplexity("[1]9.1,[2]8.2\nFinal estimate: PPL = 8.1234 +/- 0.5\n") == 8.1234
    with pytest.raises(Exception, match="no perplexity"):
        report.perplexity("[1]9.1,[2]8.2\n")


def test_a_product_is_written_for_the_program_and_read(report: ModuleType) -> None:
    assert report.operation_numbers("enum ggml_op {\n GGML_OP_NONE = 0,\n GGML_OP_DUP, // GGML_OP_X\n GGML_OP_ADD,\n};")["GGML_OP_ADD"] == 2
    line = report.product_line(29, "kt4", 164, 64, 34, rows=8, inputs=128, columns=3)
    assert line == "29 0 8 3 1 1 0 2 164 128 8 1 1 34 68 544 544 0 128 3 1 1 4 512 1536 1536 product-kt4-8x128x3"
    assert report.product_times(PERF) == {"4096x4096x512": {"kt4": 50.0, "q4_0": 125.5}}


def test_speeds_are_read_though_the_last_line_was_cut(report: ModuleType) -> None:
    rows = [(512, 0, 0, 512, 10.0), (512, 0, 4096, 2048, 20.0), (0, 64, 4096, 512, 30.0), (0, 64, 4096, 2048, 31.0)]
    lines = [json.dumps({"n_prompt": p, "n_gen": n, "n_depth": d, "n_ubatch": u, "avg_ts": v}) for p, n, d, u, v in rows]
    text = "a log line {\n" + "\n".join(lines) + '\n{"n_prompt": 512, "n_g'
    assert report.bench_speeds(text) == {"pp512 ub512": 10.0, "pp512@4096 ub2048": 20.0, "tg64@4096": 31.0}


def test_the_line_that_tells_why(report: ModuleType) -> None:
    assert report.reason("\n", "first\nCUDA error: bad\nlast\n") == "CUDA error: bad"
    traceback = "Traceback:\n from x import ToolError\nModuleNotFoundError: No module named 'x'\nlast\n"
    assert report.reason(traceback) == "ModuleNotFoundError: No module named 'x'"
    assert report.reason("", "first\nlast\n") == "last" and report.reason("", "") == "no output"
