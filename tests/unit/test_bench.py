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


def _bench_all(place: Path, *options: str) -> subprocess.CompletedProcess:
    """The same with other contenders than ours alone."""
    command = [
        sys.executable, BENCH, "--shape", "smollm2-135m", "--repetitions", "1", "--ours", place / "ours", "--stock",
        place / "stock", "--gguf-py", place, "--out", place / "out", *options,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})


@pytest.fixture
def ik(place) -> Path:
    """A built tree of ik_llama.cpp, and programs that quantize: they note what they were asked for."""
    programs = place / "ik_llama" / "build" / "bin"
    programs.mkdir(parents=True)
    bench = programs / "llama-bench"
    bench.write_text(f'#!/bin/sh\necho "ik $*" >> {place}/calls\necho \'[{{"avg_ts": 15.0}}]\'\n')
    bench.chmod(0o755)
    for directory in (programs, place / "stock"):
        program = directory / "llama-quantize"
        program.write_text(f'#!/bin/sh\necho "{directory.name}: quantize $1 $3" >> {place}/calls\ntouch "$2"\n')
        program.chmod(0o755)
    (place / "out" / "models" / "smollm2-135m-f16.gguf").touch()
    return place / "ik_llama"


def test_ik_runs_repacked_with_its_own_options_and_types(place, ik):
    contenders = ("ik, Q4_0", "ik, IQ4_K", "ik, IQ4_KS")
    done = _bench_all(place, "--ik", ik, "--contenders", *contenders, "--tests", "tg64", "tg64@8192")
    assert done.returncode == 0, done.stderr
    calls = (place / "calls").read_text().splitlines()
    assert [line.rpartition(" ")[2] for line in calls if line.startswith("bin: quantize")] == ["IQ4_K", "IQ4_KS"]
    runs = [line for line in calls if line.startswith("ik ")]
    assert len(runs) == 3 * 3 and all("-rtr 1" in line and "-ctk f16" in line for line in runs)
    assert sum("-gp 8192,64" in line for line in runs) == 3 and not any(" -d " in line for line in runs)
    assert sum("-w 0" in line for line in runs) == 3 and not any("--no-warmup" in line for line in runs)
    assert [line.split("-m ")[1].split()[0].rpartition("-")[2] for line in runs[:3]] == ["q4_0.gguf", "iq4_k.gguf", "iq4_ks.gguf"]
    assert "| ik, IQ4_KS | 15 (1.50) |" in done.stdout


def test_stocks_mixtures_are_made_by_its_own_quantize_once(place, ik):
    for _ in range(2):
        done = _bench_all(place, "--contenders", "Q4_K_M", "IQ4_XS", "--tests", "pp512")
        assert done.returncode == 0, done.stderr
    calls = (place / "calls").read_text().splitlines()
    assert [line for line in calls if "quantize" in line] == [
        f"stock: quantize {place}/out/models/smollm2-135m-f16.gguf {name}" for name in ("IQ4_XS", "Q4_K_M")
    ]
    assert "| Q4_K_M | 10 (1.00) |" in done.stdout and "| IQ4_XS | 10 (1.00) |" in done.stdout


def test_ours_runs_at_the_bits_that_are_compared(place):
    done = _bench_all(place, "--contenders", "ours", "ours, A4", "ours, A8", "--tests", "tg64")
    assert done.returncode == 0, done.stderr
    runs = [line for line in (place / "calls").read_text().splitlines() if line.startswith("ours") and "-n 64" in line]
    assert ["--activation-bits" in line and line.split()[-1] for line in runs] == [False, "4", "8"]


def test_what_ik_lacks_is_told_in_one_line(place, ik):
    done = _bench_all(place, "--contenders", "ik, Q4_0")
    assert done.returncode == 1 and done.stderr == "error: --contenders 'ik, Q4_0' needs --ik, a tree of ik_llama.cpp that you built\n"
    done = _bench_all(place, "--ik", place, "--contenders", "ik, Q4_0")
    assert done.returncode == 1 and "contains no llama-bench" in done.stderr and done.stderr.count("\n") == 1
    (ik / "build" / "bin" / "llama-quantize").unlink()
    done = _bench_all(place, "--ik", ik, "--contenders", "ik, IQ4_K")
    assert done.returncode == 1 and "llama-quantize, which does not exist" in done.stderr and done.stderr.count("\n") == 1


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
