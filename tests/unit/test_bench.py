"""tools/bench, with programs in place of llama-bench that answer at once."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "tools" / "bench"


@pytest.fixture
def place(tmp_path):
    """Programs that print how fast they were: ours twice as fast as stock's, and one line in `calls` each time."""
    for name, speed in (("ours", 20.0), ("stock", 10.0)):
        program = tmp_path / name / "llama-bench"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/calls\necho \'[{{"avg_ts": {speed}}}]\'\n')
        program.chmod(0o755)
    for kind in ("kt4", "q4_0"):
        model = tmp_path / "out" / "models" / f"smollm2-135m-{kind}.gguf"
        model.parent.mkdir(parents=True, exist_ok=True)
        model.touch()
    return tmp_path


def _bench(place: Path, *options: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable, BENCH, "--shape", "smollm2-135m", "--contenders", "ours", "--tests", "tg64", "--ours", place / "ours",
        "--stock", place / "stock", "--gguf-py", place, "--out", place / "out", *options,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})


def _results(place: Path) -> dict:
    return json.loads((place / "out" / "bench.json").read_text())["results"]["smollm2-135m"]


def test_ours_and_stocks_run_in_turn_and_the_ratio_is_printed(place):
    done = _bench(place, "--repetitions", "2")
    assert done.returncode == 0, done.stderr
    speeds = [line.split()[0] for line in (place / "calls").read_text().splitlines() if "-n 64" in line]
    assert speeds == ["ours", "stock"] * 2
    assert _results(place)["ours"]["tg64"] == [20.0, 20.0]
    assert re.search(r"\| ours \| 20 \(2\.00\) \|", done.stdout) and "tg64 (median of 2)" in done.stdout


def test_continue_adds_the_rounds_that_are_missing(place):
    assert _bench(place, "--repetitions", "1").returncode == 0
    calls = (place / "calls").read_text().count("-n 64")
    done = _bench(place, "--repetitions", "3", "--continue")
    assert done.returncode == 0, done.stderr
    assert (place / "calls").read_text().count("-n 64") == calls + 2 * 2
    assert {len(values["tg64"]) for values in _results(place).values()} == {3}


def test_continue_refuses_another_build_and_keeps_what_is_there(place):
    assert _bench(place, "--repetitions", "1").returncode == 0
    before = (place / "out" / "bench.json").read_bytes()
    with (place / "ours" / "llama-bench").open("a") as program:
        program.write("# rebuilt\n")
    done = _bench(place, "--repetitions", "2", "--continue")
    assert done.returncode == 1 and "other builds" in done.stderr and done.stderr.count("\n") == 1
    assert (place / "out" / "bench.json").read_bytes() == before


def test_a_program_that_fails_is_named_with_its_last_line(place):
    (place / "stock" / "llama-bench").write_text("#!/bin/sh\necho out of memory >&2\nexit 3\n")
    done = _bench(place, "--repetitions", "1")
    assert done.returncode == 1 and done.stderr.endswith("smollm2-135m-q4_0.gguf: out of memory\n")
    assert not (place / "out" / "bench.json").exists()
