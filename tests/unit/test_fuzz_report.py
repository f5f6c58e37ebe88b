"""What tools/fuzz makes of the harness's output: whose a crash is, and what was covered."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"

OVERFLOW = """\
INFO: Running with entropic power schedule (0xFF, 100).
=================================================================
==77==ERROR: AddressSanitizer: heap-buffer-overflow on address 0x602000000052 at pc 0x55f bp 0x7ff sp 0x7fe
READ of size 2 at 0x602000000052 thread T0
    #0 0x55f1 in memcpy (/build/fuzz-gguf+0x1)
    #1 0x55f2 in {inner} /a/{inner_file}:12:3
    #2 0x55f3 in load_all_data(ggml_context*) /b/vendor/llama.cpp/src/llama-model-loader.cpp:1745:9

0x602000000052 is located 0 bytes to the right of 2-byte region
allocated by thread T0 here:
    #0 0x55f9 in make_r4 /a/cpp_patches/src/llama/kurtail.cpp:1:1
"""


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("fuzz_report")


@pytest.mark.parametrize(
    ("inner_file", "ours", "where"),
    [
        ("cpp_patches/src/cpu/kt4-layout.cpp", True, "cpp_patches/src/cpu/kt4-layout.cpp:12"),
        # where the memory came from is another stack and says nothing
        ("vendor/llama.cpp/ggml/src/gguf.cpp", False, "vendor/llama.cpp/ggml/src/gguf.cpp:12"),
    ],
)
def test_a_crash_belongs_to_the_sources_on_its_stack(report, inner_file, ours, where):
    found = report.finding(OVERFLOW.format(inner="f(char const*, int)", inner_file=inner_file))
    assert found == report.Finding(ours, f"heap-buffer-overflow: {where}")


def test_an_allocation_too_large(report):
    output = "==5== ERROR: libFuzzer: out-of-memory (malloc(17179869184))\n   To change the limit\n\n    #0 0x1 in __sanitizer_print_stack_trace (/x+0x1)\n"
    output += "    #9 0x2 in make_r4 /a/cpp_patches/src/llama/kurtail.cpp:240:9\n\nSUMMARY: libFuzzer: out-of-memory\n"
    assert report.finding(output) == report.Finding(True, "out-of-memory: cpp_patches/src/llama/kurtail.cpp:240")


def test_undefined_behaviour_and_assertions(report):
    ours = "/a/cpp_patches/src/kt4-quants.c:30:5: runtime error: shift exponent 40 is too large\n"
    theirs = "/b/vendor/llama.cpp/src/llama.cpp:3:5: runtime error: load of null pointer\nupstream aborts: ggml/src/gguf.cpp:196: GGML_ASSERT(x) failed\n"
    assert report.finding(ours) == report.Finding(True, "undefined behaviour: cpp_patches/src/kt4-quants.c:30:5: shift exponent 40 is too large")
    assert report.finding("assertion in our sources: /a/cpp_patches/src/cpu/kt4-repack.cpp:5: no\n").ours
    assert report.finding(theirs) is None
    assert report.upstream_notes(ours + theirs + theirs) == [
        "assertion: ggml/src/gguf.cpp:196: GGML_ASSERT(x) failed",
        "undefined behaviour: vendor/llama.cpp/src/llama.cpp:3: load of null pointer",
    ]


def test_no_crash(report):
    assert report.finding("Done 300 runs in 2 second(s)\n") is None


def test_coverage(report):
    files = [
        {"filename": "/a/cpp_patches/src/llama/kurtail.cpp", "summary": {"lines": {"count": 13, "covered": 5, "percent": 38.4}}},
        {"filename": "/b/vendor/llama.cpp/src/llama.cpp", "summary": {"lines": {"count": 1, "covered": 1, "percent": 100}}},
    ]
    assert report.coverage(json.dumps({"data": [{"files": files}]})) == {"llama/kurtail.cpp": (5, 13)}
