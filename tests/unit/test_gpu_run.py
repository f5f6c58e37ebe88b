"""tools/gpu_run and tools/gpu_bundle without a GPU: parts, time limits, what is kept after failures, tables, files' headers."""

from __future__ import annotations

import importlib
import json
import os
import struct
import subprocess
import sys
import tarfile
import time
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch):
    """Imports a module or script of tools/."""
    monkeypatch.syspath_prepend(TOOLS)

    def load(name: str) -> ModuleType:
        if (TOOLS / f"{name}.py").is_file():
            return importlib.import_module(name)
        loader = SourceFileLoader(name, str(TOOLS / name))
        spec = spec_from_loader(name, loader)
        assert spec is not None
        module = module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        loader.exec_module(module)
        return module

    return load


@pytest.fixture
def place(tool, tmp_path: Path):
    """A place with a minute's time."""
    found = tool("gpu_place").Place(tmp_path, "CPU", tmp_path / "steps.log")
    found.deadline = time.monotonic() + 60
    return found


@pytest.fixture
def parts(tool, tmp_path: Path) -> tuple[ModuleType, dict, Path]:
    """Two payloads, one of 1.5 MiB and one of 2.5, in parts of 2 MiB."""
    gpu_parts = tool("gpu_parts")
    payloads = {}
    for name, size in (("programs", 3 * 2**19), ("package", 5 * 2**19)):
        (tmp_path / name).write_bytes(os.urandom(size))
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            tar.add(tmp_path / name, name)
        payloads[name] = tmp_path / f"{name}.tar"
    return gpu_parts, gpu_parts.pack(payloads, tmp_path / "bundle", 2 * 2**20), tmp_path


def test_payloads_are_cut_into_parts_and_put_together(parts) -> None:
    gpu_parts, layout, tmp = parts
    directories = sorted((tmp / "bundle").iterdir())
    assert len(directories) == len(layout["parts"]) == 3
    assert all(sum(path.stat().st_size for path in directory.iterdir()) <= 2 * 2**20 for directory in directories)
    assert [gpu_parts.completed(layout, part) for part in (1, 2, 3)] == [{"programs"}, set(), {"package"}]
    assert gpu_parts.completed(layout, None) == {"programs", "package"}
    work = tmp / "work"
    for part in (1, 2, 2, 3):  # a part may be sent twice
        assert gpu_parts.read_layout(tmp / "bundle", part) == layout
        gpu_parts.unpack(tmp / "bundle", layout, part, work)
    assert all((work / name).read_bytes() == (tmp / name).read_bytes() for name in ("programs", "package"))


def test_damaged_and_missing_parts_are_told(parts) -> None:
    gpu_parts, layout, tmp = parts
    with pytest.raises(gpu_parts.ToolError, match="package is incomplete: unpack part 2 first"):
        gpu_parts.unpack(tmp / "bundle", layout, 3, tmp / "work")
    piece = tmp / "bundle" / "part1" / "programs.00"
    piece.write_bytes(b"\0" + piece.read_bytes()[1:])
    with pytest.raises(gpu_parts.ToolError, match="part1/programs.00 is damaged: copy part 1 again"):
        gpu_parts.unpack(tmp / "bundle", layout, 1, tmp / "work")
    with pytest.raises(gpu_parts.ToolError, match="part4/bundle.json is missing"):
        gpu_parts.read_layout(tmp / "bundle", 4)


def _lives(process: str) -> bool:
    try:
        return " Z " not in (Path("/proc") / process / "stat").read_text()
    except OSError:
        return False


def test_a_program_and_what_it_started_end_when_time_is_up(tool, place, tmp_path: Path) -> None:
    place.deadline = time.monotonic() + 1
    script = f"echo begun; (sleep 30; touch {tmp_path}/survived) & echo $! > {tmp_path}/child; sleep 30"
    with pytest.raises(tool("gpu_place").OutOfTime, match="sh: time was up; its last line: begun"):
        place.run("sh", "-c", script)
    # the end of what was killed takes its moment on a machine that is busy
    until = time.monotonic() + 20
    while _lives((tmp_path / "child").read_text().strip()) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _lives((tmp_path / "child").read_text().strip())
    assert "[status -9]" in place.log.read_text()
    place.deadline = time.monotonic() + 1
    done = place.attempt("sh", "-c", "echo '{\"a\": 1}'; sleep 30", partial=True)
    assert done.timed_out and done.stdout == '{"a": 1}\n'


def test_failures_of_programs_are_one_line(tool, place) -> None:
    with pytest.raises(tool("environment").ToolError, match="sh failed with status 3: CUDA error: no memory"):
        place.run("sh", "-c", "echo begun; echo 'CUDA error: no memory' >&2; echo end >&2; exit 3")
    with pytest.raises(tool("environment").ToolError, match="nothing-of-that-name: No such file"):
        place.run("nothing-of-that-name")


def test_what_is_started_goes_on_and_is_waited_for(tool, place) -> None:
    place.start("late", "sh", "-c", "sleep 0.5; echo '{}'")
    assert place.finished("late") == "{}\n"
    place.start("bad", "sh", "-c", "echo 'error: a reason' >&2; exit 2")
    with pytest.raises(tool("environment").ToolError, match="bad failed: error: a reason"):
        place.finished("bad")
    with pytest.raises(tool("environment").ToolError, match="never was not started"):
        place.finished("never")
    place.start("slow", "sleep", "5")
    place.deadline = time.monotonic()
    with pytest.raises(tool("gpu_place").OutOfTime, match="slow: still running"):
        place.finished("slow")


def test_models_stay_where_they_were_begun(tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_place = tool("gpu_place")
    found = gpu_place.Place(tmp_path / f"work-{os.getpid()}", "CUDA0", tmp_path / "log")
    free = {"bytes": gpu_place.MODELS_BYTES + 1}
    monkeypatch.setattr(gpu_place.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free["bytes"]})())
    memory = found.models
    assert memory.parent == Path("/dev/shm")
    free["bytes"] = 0
    assert found.models == found.work / "models"
    memory.mkdir()
    try:
        assert found.models == memory
    finally:
        memory.rmdir()


def test_steps_after_a_failure_run_and_results_are_kept(tool, parts, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    gpu_run, gpu_steps, tmp = tool("gpu_run"), tool("gpu_steps"), parts[2]
    out = tmp / "out"

    def kept() -> list[str]:
        path = out / "results.jsonl"
        return [json.loads(line)["status"] for line in path.read_text().splitlines()] if path.exists() else []

    def bad(place):
        raise ValueError("a defect")

    def skipped(place):
        raise gpu_steps.Skipped("nothing here")

    def hangs(place):
        assert kept() == ["pass", "error", "skipped"]
        place.run("sleep", "60")

    def step(name, run, budget=9, payload="programs"):
        return gpu_steps.Step(name, budget, payload, run)

    steps = (step("good", lambda place: ({"n": 1}, [])), step("bad", bad), step("none", skipped), step("hangs", hangs, 0.05),
             step("missed", lambda place: ({"kld": 0.5}, ["KLD 0.5"])), step("later", lambda place: ({}, []), payload="package"))  # fmt: skip
    monkeypatch.setattr(gpu_run, "STEPS", steps)
    command = ["gpu_run", "--bundle", tmp / "bundle", "--work", tmp / "work", "--out", out, "--device", "CPU"]

    monkeypatch.setattr(sys, "argv", [str(word) for word in [*command, "--part", 1]])
    assert gpu_run.main() == 1
    assert kept() == ["pass", "error", "skipped", "timeout", "fail"]
    text = capsys.readouterr().out
    assert "| bad | error |" in text and "ValueError: a defect" in text and "| missed | fail |" in text and "KLD 0.5" in text

    monkeypatch.setattr(sys, "argv", [str(word) for word in [*command, "--only", "good; later"]])
    assert gpu_run.main() == 0
    # the last line of a step is the one that counts, and earlier calls' steps stay in the table
    report = (out / "report.md").read_text()
    assert report.count("| good |") == 1 and "| hangs | timeout |" in report and "| later | pass |" in report

    monkeypatch.setattr(sys, "argv", [str(word) for word in [*command, "--only", "good", "--seconds", "0"]])
    assert gpu_run.main() == 1 and kept()[-1] == "left out"
    assert "| good | pass |" in (out / "report.md").read_text()
    monkeypatch.setattr(sys, "argv", [str(word) for word in [*command, "--only", "other"]])
    with pytest.raises(tool("environment").ToolError, match="there is no step 'other'; the steps are: good; bad"):
        gpu_run.main()


def test_the_steps_are_those_that_the_bundle_has_time_for(tool) -> None:
    steps, bundle = tool("gpu_steps").STEPS, tool("gpu_bundle")
    assert len({step.name for step in steps}) == len(steps)
    assert {step.payload for step in steps} == set(bundle.SECONDS)
    assert sum(bundle.SECONDS.values()) <= 12 * 60 - 80  # the machine's start
    assert all(step.budget <= bundle.SECONDS[step.payload] for step in steps)


def test_results_are_tabulated(tool) -> None:
    lines = [
        {"step": "environment", "status": "pass", "seconds": 1.0, "why": [], "result": {"gpu": "NVIDIA H100", "cores": 16}},
        {"step": "7b kt4", "status": "pass", "seconds": 9.0, "why": [], "result": {"tokens_per_s": {"pp512 ub512": 300.0, "tg64": 90.0}}},
        {"step": "7b q4_0", "status": "fail", "seconds": 9.0, "why": ["a | b"], "result": {"tokens_per_s": {"pp512 ub512": 100.0}}},
        {"step": "products", "status": "pass", "seconds": 9.0, "why": [], "result": {"us": {"4096x4096x512": {"kt4": 50.0, "q4_0": 125.5}}}},
        {"step": "kernel speed", "status": "pass", "seconds": 2.0, "why": [],
         "result": {"kernels": [{"kernel": "gemv", "rows": 8, "inputs": 64, "columns": 1, "us": 2.5, "tb_per_s": 1.25, "tops": 3.0}]}},
        {"step": "convert", "status": "pass", "seconds": 5.0, "why": [],
         "result": {"seconds": {"source": 1.0, "rotations": 2.0}, "card_peak_bytes": {"stages": {"rotations": {"allocated": 1e9, "reserved": 1.5e9}}}}},
        {"step": "learned", "status": "pass", "seconds": 5.0, "why": [], "result": {"seconds_cpu": {"source": 1.5, "rotations": 40.0}}},
        {"step": "imports", "status": "left out", "seconds": 0.0, "why": ["--seconds was up"]},
    ]  # fmt: skip
    text = tool("gpu_tables").tables(lines)
    for row in (
        "| environment | pass | 1.0 | gpu NVIDIA H100, cores 16 |", "| 7b q4_0 | fail | 9.0 | a / b |", "| imports | left out | 0.0 | --seconds was up |",
        "| 7b, tokens/s | pp512 ub512 | tg64 |", "| kt4 | 300 (3.00) | 90 |", "| q4_0 | 100 (1.00) |  |",
        "| 4096x4096x512 | 50 (2.51) | 125.5 (1.00) | 343.6 |", "| gemv | 8x64x1 | 2.5 | 1.25 | 3 |", "| rotations | 2.0 | 40.0 | 1.50 |",
    ):  # fmt: skip
        assert row in text, text


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A header with a list of strings before the values, and three tensors, one of them 17 rows high."""
    values = _string("tokens") + struct.pack("<IIQ", 9, 8, 2) + _string("a") + _string("bc")
    values += _string("kurtail.activation_bits") + struct.pack("<II", 4, 4) + _string("name") + struct.pack("<I", 8) + _string("x")
    values += _string("kurtail.kv_bits") + struct.pack("<II", 4, 4)
    shapes = {"a": ((64, 32), 164), "b": ((128, 17), 164), "c": ((64,), 0)}
    tensors = b"".join(_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, 32) for name, (shape, kind) in shapes.items())
    path = tmp_path / "file.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, len(shapes), 4) + values + tensors + b"\xab" * 256)
    return path


def test_values_of_a_file_are_changed_in_place(tool, gguf: Path) -> None:
    header = tool("gguf_header")
    before = gguf.read_bytes()
    header.set_uint32(gguf, {"kurtail.activation_bits": 8, "kurtail.kv_bits": 16})
    after = gguf.read_bytes()
    changed = {i: (a, b) for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b}
    values = header.read_header(gguf).values
    assert changed == {values["kurtail.activation_bits"].begin: (4, 8), values["kurtail.kv_bits"].begin: (4, 16)}
    for key, told in (("name", "of another type"), ("tokens", "of another type"), ("kurtail.r9", "missing")):
        with pytest.raises(tool("environment").ToolError, match=f"{key} is {told}"):
            header.set_uint32(gguf, {"kurtail.kv_bits": 4, key: 1})
    assert gguf.read_bytes() == after


def test_bytes_in_groups_are_counted(tool, gguf: Path) -> None:
    header = tool("gguf_header")
    assert header.multiplied_bytes(gguf, 164, 64, 34) == 32 * 34
    begin = header.read_header(gguf).tensors["a"][2]
    assert begin % 32 == 0 and gguf.read_bytes()[begin - 32 :][0] == 0xAB
    gguf.write_bytes(b"GGML" + gguf.read_bytes()[4:])
    with pytest.raises(tool("environment").ToolError, match="is not a GGUF file of version 3"):
        header.read_header(gguf)


def test_a_file_is_cut_after_its_first_layers(tool, tmp_path: Path) -> None:
    header = tool("gguf_header")
    names = ("token_embd.weight", "blk.0.a.weight", "blk.10.a.weight", "blk.1.a.weight", "output.weight")
    contents = {name: bytes([number + 1]) * (32 * (number + 1)) for number, name in enumerate(names)}
    bits, scores = struct.pack("<22I", *range(22)), struct.pack("<22f", *range(22))
    values = _string("llama.block_count") + struct.pack("<II", 4, 11) + _string("bits") + struct.pack("<IIQ", 9, 4, 22) + bits
    values += _string("tokenizer.scores") + struct.pack("<IIQ", 9, 6, 22) + scores + _string("last") + struct.pack("<II", 4, 7)
    tensors, offset = b"", 0
    for name, content in contents.items():
        tensors += _string(name) + struct.pack("<IQIQ", 1, len(content), 24, offset)
        offset += len(content)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(names), 4) + values + tensors
    path, out = tmp_path / "file.gguf", tmp_path / "first.gguf"
    path.write_bytes(head + b"\0" * (-len(head) % 32) + b"".join(contents.values()))
    header.first_layers(path, out, 1)
    found = header.read_header(out)
    assert list(found.tensors) == ["token_embd.weight", "blk.0.a.weight", "output.weight"]
    data = out.read_bytes()
    assert [struct.unpack_from("<I", data, found.values[key].begin)[0] for key in ("llama.block_count", "last")] == [1, 7]
    # two numbers a layer are cut with the layers, as many of the vocabulary are not
    assert data[found.values["bits"].begin : found.values["bits"].end] == struct.pack("<IQ", 4, 2) + bits[:8]
    assert data[found.values["tokenizer.scores"].begin : found.values["tokenizer.scores"].end] == struct.pack("<IQ", 6, 22) + scores
    for name, ((size,), _, begin) in found.tensors.items():
        assert begin % 32 == 0 and data[begin : begin + size] == contents[name]
    header.first_layers(path, out, 11)
    assert out.read_bytes() == path.read_bytes()


def test_the_drivers_functions_are_found_by_their_exported_names(tool) -> None:
    cuda_h = "#define cuMemAlloc                          cuMemAlloc_v2\nCUresult CUDAAPI cuMemAlloc(CUdeviceptr *p);\nCUresult CUDAAPI cuMemMap(int);\nCUresult CUDAAPI cuInit(unsigned);\n"
    sources = ["CU_CHECK(cuMemMap(pool)); cuMemAlloc(&p); cublasCreate(&h); cudaMalloc(&p); cuThing x;"]
    assert tool("gpu_build").driver_functions(sources, cuda_h) == ["cuMemAlloc_v2", "cuMemMap"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["gpu_bundle", "--model", "nothing.gguf"], "nothing.gguf does not exist"),
        (["gpu_bundle", "--size", "64"], "are more than the 64 MiB that travel at once"),
        (["gpu_bundle", "--no-build", "--build", "nowhere", "--out", "parts"], "the build is not complete"),
        (["gpu_run", "--bundle", "nowhere", "--work", "work", "--out", "out"], "part1/bundle.json is missing"),
    ],
)
def test_bad_input_is_one_line(command: list[str], message: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, TOOLS / command[0], *command[1:]], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
