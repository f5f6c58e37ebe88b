"""Measured commands: status, lines, memory of children's children, and none of the caller's own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kurtail_gguf.machine.resources import peak_memory, run_measured

MB = 1_000_000


def _python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def test_lines_and_status():
    lines = []
    measured = run_measured(_python("import sys; print('no'); sys.stderr.write('one\\ntwo'); sys.exit(3)"), lines.append)
    assert lines == ["one", "two"]
    assert measured.status == 3


def test_a_signal_is_a_negative_status():
    assert run_measured(_python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")).status == -9


def test_memory_is_that_of_the_largest_process_below_and_not_the_callers():
    mine = bytearray(400 * MB)
    mine[:: 4096] = b"x" * len(mine[:: 4096])  # resident, not only asked for
    small = run_measured(_python("pass"))
    assert small.peak_bytes < 100 * MB
    allocate = "import sys; bytearray(200_000_000)"
    child = run_measured(_python(allocate))
    grandchild = run_measured(_python("import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])", allocate))
    for measured in (child, grandchild):
        assert 200 * MB < measured.peak_bytes < 300 * MB
    assert len(mine) == 400 * MB


def test_seconds_are_those_on_the_clock():
    assert 0.2 <= run_measured(_python("import time; time.sleep(0.2)")).seconds < 20


def test_a_program_that_is_not_there():
    with pytest.raises(RuntimeError, match="without a result"):
        run_measured(["/no/such/program"])


def test_peak_memory_outlives_what_took_it():
    before = peak_memory()
    subprocess.run([sys.executable, "-c", f"bytearray({before + 100 * MB})"], check=True)
    assert before + 100 * MB <= peak_memory() < before + 200 * MB
