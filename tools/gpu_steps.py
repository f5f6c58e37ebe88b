"""The steps of tools/gpu_run, a function each: takes the place, returns what was found and what is wrong with it."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import gpu_report as report
from environment import ROOT, ToolError
from gguf_header import first_layers, multiplied_bytes, set_uint32
from gpu_place import Place
from random_models import TYPES

@dataclass(frozen=True)
class Bits:
    """How a file's predictions are compared: bits of activations, type of the cache, its first layers or all of them."""

    activations: int
    cache: str
    layers: int | None
    limit: report.Limit


# GPU and CPU add in another order, and roundings to few bits make that larger from layer to layer: after 30 layers of W4A4 two
# orders of one file are as far apart (0.45 nats) as files that have nothing in common. So W4A4 is compared after one
# layer, and whole files with 8-bit activations. docs/cuda.md has what two orders of the CPU's, and 16 rows of a product
# that are missing, were measured to make of each; the limits lie between them.
LOGITS = {
    "W4A4KV4, first layer": Bits(4, "q4_0", 1, report.Limit(0.05)),
    "W4A4KV16, first layer": Bits(4, "f16", 1, report.Limit(0.01)),
    "W4A8KV4, first layer": Bits(8, "q4_0", 1, report.Limit(0.003)),
    "W4A8KV16": Bits(8, "f16", None, report.Limit(0.02, 0.02)),
    "W4A4KV4": Bits(4, "q4_0", None, report.Limit()),
}

# rows x inputs: more bytes than a GPU's cache holds in every type (60 MB on an H200), so that generation reads memory
PRODUCTS = [(16384, 8192), (8192, 16384)]
COLUMNS = (1, 512, 2048)

# of convert, for the model learned on the GPU and on the CPU
LEARNING = ["--calibration-tokens", "8192", "--tune", "32"]
LEARNING_TINY = ["--calibration-tokens", "1024", "--tune", "2"]

#: what a step found, and what is wrong with it
Found = tuple[dict, list[str]]


@dataclass(frozen=True)
class Step:
    """``budget``: seconds. ``payload``: of the bundle, that it needs; it runs with the part that completes it."""

    name: str
    budget: float
    payload: str
    run: Callable[[Place], Found] = field(repr=False)


class Skipped(Exception):
    """Why a step was left out."""


# --- programs


def environment(place: Place) -> Found:
    """The machine, libraries that are missing, and whether llama.cpp sees the GPU with the memory pool users get."""
    wrong = []
    found: dict = {"python": sys.version.split()[0], "cores": os.cpu_count()}
    for name in sorted(path.name for path in place.bin.iterdir()):
        told = place.attempt("ldd", place.bin / name)
        wrong += [f"{name}: {line.strip()}" for line in told.stdout.splitlines() if "not found" in line]
    listed = place.run(place.bin / "llama-bench", "--list-devices")
    found["devices"] = [line.strip() for line in (listed.stdout + listed.stderr).splitlines() if ": " in line]
    if not place.tiny:
        query = "name,driver_version,memory.total,clocks.sm,clocks.mem"
        found["gpu"] = place.run("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader").stdout.strip()
        if not any(line.startswith(place.device) for line in found["devices"]):
            wrong.append(f"{place.device} is not among llama.cpp's devices")
        if not any("VMM: yes" in line for line in found["devices"]):
            wrong.append("the device has no virtual memory management (VMM: yes): the memory pool is not the usual one")
    return found, wrong


def write_models(place: Place) -> Found:
    """Start writing the random models; speed() waits for its own."""
    shapes = ["tiny"] if place.tiny else ["7b", "1b"]
    wanted = [f"{shape}:{kind}" for shape in shapes for kind in TYPES]
    place.start("models", *place.python(ROOT / "tools" / "random_models.py"), "--gguf-py", place.work / "gguf-py", "--out", place.models, *wanted)
    return {"directory": str(place.models), "models": wanted}, []


def kernels(program: str, s4: bool, place: Place) -> Found:
    """The kernels' own test, bit-equal to its references; without a GPU their emulation.

    program: of the test. s4: whether kernels for int4 matrix units have to be among them.
    """
    if s4 and not place.tiny and not (place.bin / program).is_file():
        raise Skipped("this GPU's own kernels for int4 matrix units are among those tested")
    done = place.attempt(place.bin / "test-kt4-cuda", "--quick") if place.tiny else place.attempt(place.bin / program)
    found = report.kernel_checks(done.stdout, done.status, done.stderr)
    wrong = [line for line in done.stdout.splitlines() if line.startswith("FAILED")][:5]
    if found["failures"] or done.status:
        wrong.insert(0, f"{found['failures']} of {found['checks']} checks failed, status {done.status}")
    if s4 and not found["s4"]:
        wrong.append("the kernels for int4 matrix units were not tested")
    return found, wrong


def sanitizer(tool: str, place: Place) -> Found:
    """A short form of the kernels' test under compute-sanitizer."""
    if place.tiny:
        raise Skipped("only a GPU tells")
    program = shutil.which("compute-sanitizer") or next(map(str, sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))), None)
    if program is None:
        raise Skipped("compute-sanitizer is not installed")
    done = place.attempt(program, "--tool", tool, "--print-limit", "5", place.bin / "test-kt4-gpu", "--quick")
    found = {"errors": report.sanitizer_errors(done.stdout + done.stderr)}
    found |= report.kernel_checks(done.stdout, done.status, done.stderr)
    return found, [f"{tool}: {found['errors']} errors"] if found["errors"] else []


def kernel_speed(place: Place) -> Found:
    """Kernels in production on shapes of large models: microseconds, TB/s, TOPS."""
    if place.tiny:
        raise Skipped("only a GPU tells")
    done = place.attempt(place.bin / "test-kt4-gpu", "--speed", partial=True)
    lines = report.json_lines(done.stdout)
    return {"kernels": lines}, [] if lines and done.status == 0 else [f"status {done.status}: {report.reason(done.stderr, done.stdout)}"]


def ceilings(place: Place) -> Found:
    """A copy and matrix products through torch."""
    done = place.run(*place.python(ROOT / "tools" / "gpu_ceilings.py"), place.torch_device)
    return report.json_lines(done.stdout)[-1], []


def operations(options: list[str], demanded: dict[str, str], place: Place) -> Found:
    """test-backend-ops against the CPU's reference."""
    jobs = min(8, os.cpu_count() or 1)
    done = place.attempt(place.bin / "test-backend-ops", "test", "-b", place.device, "-j", jobs, *options, partial=True)
    if done.timed_out:
        cases = report.backend_cases(done.stdout, place.device)
        wrong = ["time was up", *report.case_complaints(cases, {}, place.device)]
    else:
        cases = report.backend_cases(done.stdout, place.device, done.status, done.stderr)
        wrong = report.case_complaints(cases, demanded, place.device)
    return {"passed": sum(case.state == "ok" for case in cases), "cases": report.counts(cases)}, wrong


# --- speed


def speed(shape: str, kind: str, place: Place) -> Found:
    """Tokens a second of a random model, and of kt4 where llama.cpp put it."""
    if place.tiny:
        shape = "tiny"
    path = place.models / f"{shape}-{kind}.gguf"
    while not path.exists() and place.seconds() > 1 and not (place.work / "models.status").exists():
        place.attempt("sleep", "0.5")
    if not path.exists():
        place.finished("models")  # tells why
        raise ToolError(f"{path} was not written")
    bench = [place.bin / "llama-bench", "-m", path, "-fa", "1", *place.layers]
    found, wrong = {}, []
    if kind == "kt4":  # by itself: what -v prints takes time
        log = place.run(*bench, "-v", "-p", "16", "-n", "1", "-r", "1", "-o", "jsonl").stderr
        where = report.placement(log)
        found = {"weights_mib": where.weights, "splits": where.splits}
        wrong = report.placement_complaints(where, place.device, multiplied_bytes(path, *TYPES["kt4"]))
    tests = ["-p", "16,32", "-n", "4", "-d", "0,32", "-ub", "16,32", "-r", "1"] if place.tiny else \
        ["-p", "512,2048", "-n", "64", "-d", "0,4096", "-ub", "512,2048", "-r", "3"]  # fmt: skip
    done = place.attempt(*bench, "-o", "jsonl", *tests, partial=True)
    if not done.timed_out and done.status != 0:
        raise ToolError(f"llama-bench failed with status {done.status}: {report.reason(done.stderr, done.stdout)}")
    wrong += ["time was up: some tests are missing"] if done.timed_out else []
    return found | {"tokens_per_s": report.bench_speeds(done.stdout)}, wrong


def products(place: Place) -> Found:
    """Single products by test-backend-ops, whose weights are as in the file: kt4's include repacking above 8 columns."""
    number = report.operation_numbers((place.work / "ggml.h").read_text())["GGML_OP_MUL_MAT"]
    shapes = [(256, 512)] if place.tiny else PRODUCTS
    columns = (1, 16) if place.tiny else COLUMNS
    lines = [report.product_line(number, name, *TYPES[name], rows, inputs, n) for rows, inputs in shapes for n in columns for name in TYPES]
    path = place.work / "products.txt"
    path.write_text("\n".join(lines) + "\n")
    done = place.attempt(place.bin / "test-backend-ops", "perf", "-b", place.device, "--test-file", path, partial=True)
    times = report.product_times(done.stdout)
    measured = sum(map(len, times.values()))
    return {"us": times}, [] if measured == len(lines) else [f"{measured} of {len(lines)} products were measured"]


# --- the package


def imports(place: Place) -> Found:
    """Every module of the package, in this Python and with its libraries; what torch sees; a rotation solved on the device."""
    program = ROOT / "tools" / "gpu_imports.py"
    done = place.run(*place.python(program), place.torch_device, cwd=place.work)
    return report.json_lines(done.stdout)[-1], []


def write_wide(place: Place) -> Found:
    """Start writing the checkpoint that convert_wide() takes: one layer of Llama-3-70B's widths."""
    shape = ["--shape", "70b/8", "--vocab", "1024"] if place.tiny else ["--shape", "70b", "--vocab", "32000"]
    directory = place.models / "wide"
    shutil.rmtree(directory, ignore_errors=True)
    place.models.mkdir(parents=True, exist_ok=True)
    place.start("wide", *place.python(ROOT / "tools" / "wide_model.py"), directory, "--layers", "1", *shape)
    return {"directory": str(directory)}, []


def _convert(place: Place, model: Path, out: str, device: str, *options: str) -> list[object]:
    # -P: the checkout's own package, without a runtime, is not to be found first
    return [*place.python("-P", "-m", "kurtail_gguf.cli.main"), "convert", model, place.work / out, "--device", device, "--restart", "--json",
            "--work-dir", place.work / f"{out}.work", *options]  # fmt: skip


def _told(text: str) -> dict:
    """What of convert's answer is worth keeping."""
    answer = json.loads(text)
    return {name: answer[name] for name in ("seconds", "peak_bytes", "device", "card_peak_bytes") if name in answer}


def _calibration(place: Place) -> list[str]:
    return ["--calibration", str(place.work / "text.txt"), *(LEARNING_TINY if place.tiny else LEARNING)]


def start_conversions(place: Place) -> Found:
    """Start on the CPU: the conversion that the GPU's is compared with, and a quick one for the logits."""
    model = place.work / "model.gguf"
    # beside the GPU's conversion, which wants cores as well
    some = ["env", f"OMP_NUM_THREADS={max(1, 3 * (os.cpu_count() or 1) // 8)}"]
    place.start("logits-file", *some, *_convert(place, model, "logits.gguf", "cpu", "--rotation", "hadamard", "--weights", "rtn", "--kv", "4"))
    place.start("learned-cpu", *some, *_convert(place, model, "learned-cpu.gguf", "cpu", *_calibration(place)))
    return {"started": ["logits-file", "learned-cpu"]}, []


def convert(place: Place) -> Found:
    """A real model on the GPU: seconds and memory by stage."""
    done = place.run(*_convert(place, place.work / "model.gguf", "learned.gguf", place.torch_device, *_calibration(place)))
    return _told(done.stdout), []


def compare(place: Place, reference: Path, file: Path, cache: str) -> tuple[dict[str, float], report.Placement]:
    """Predictions of a file on the device against a reference's on the CPU, and where the file was put."""
    base = place.work / f"{file.stem}.logits"
    common = ["-f", place.work / "text.txt", "-c", "512", "--chunks", "1" if place.tiny else "4", "-fa", "on", "-ctk", cache, "-ctv", cache,
              "--kl-divergence-base", base]  # fmt: skip
    place.run(place.bin / "llama-perplexity", "-m", reference, *common, "-ngl", "0", "-dev", "none")
    done = place.run(place.bin / "llama-perplexity", "-m", file, *common, "--kl-divergence", "-lv", "4", *place.layers)
    base.unlink()
    return report.divergence(done.stdout), report.placement(done.stdout + done.stderr)


def prepare(bits: Bits, file: Path, out: Path) -> None:
    """A file with activations of other bits, and of its layers only the first."""
    if bits.layers is None:
        shutil.copyfile(file, out)
    else:
        first_layers(file, out, bits.layers)
    set_uint32(out, {"kurtail.activation_bits": bits.activations})


def logits(name: str, place: Place) -> Found:
    """A file on the GPU against the CPU, with the bits of activations and cache that the name says."""
    bits = LOGITS[name]
    place.finished("logits-file")
    path = place.work / "compared.gguf"
    prepare(bits, place.work / "logits.gguf", path)
    found, where = compare(place, path, path, bits.cache)
    wrong = report.divergence_complaints(found, bits.limit)
    wrong += report.placement_complaints(where, place.device, multiplied_bytes(path, *TYPES["kt4"]))
    limit = {} if math.isinf(bits.limit.kld) else {"limit": bits.limit.kld}
    return found | limit | {"weights_mib": where.weights, "splits": where.splits}, wrong


def learned(place: Place) -> Found:
    """The files learned on the GPU and on the CPU: perplexity of both, on the GPU."""
    cpu = json.loads(place.finished("learned-cpu"))
    found: dict = {"seconds_cpu": cpu["seconds"]}
    for name, file in (("gpu", "learned.gguf"), ("cpu", "learned-cpu.gguf")):
        chunks = "1" if place.tiny else "16"
        done = place.run(place.bin / "llama-perplexity", "-m", place.work / file, "-f", place.work / "text.txt", "-c", "512", "--chunks", chunks, *place.layers)
        found[name] = report.perplexity(done.stdout + done.stderr)
    return found, report.learning_complaints(found["gpu"], found["cpu"])


def convert_wide(place: Place) -> Found:
    """A layer of 70B's widths with GPTQ on the GPU: seconds and memory by stage."""
    place.finished("wide")
    options = ["--rotation", "hadamard", "--weights", "gptq", "--tune", "0", "--calibration", str(place.work / "text.txt")]
    options += ["--calibration-tokens", "1024"] if place.tiny else []
    done = place.run(*_convert(place, place.models / "wide", "wide.gguf", place.torch_device, *options))
    return _told(done.stdout), []


Q4_0_CACHE = ["-o", "FLASH_ATTN_EXT", "-p", "type_K=q4_0,type_V=q4_0"]
MIXED_CACHE = ["-o", "FLASH_ATTN_EXT", "-p", "type_K=q8_0,type_V=q4_0"]

STEPS = (
    Step("environment", 40, "programs", environment),
    Step("write models", 10, "programs", write_models),
    Step("kernels", 60, "programs", partial(kernels, "test-kt4-gpu", False)),
    Step("kernels of compute_80", 60, "programs", partial(kernels, "test-kt4-gpu-ptx", True)),
    Step("operations", 90, "programs", partial(operations, ["-p", "kt4"], report.PRODUCTS)),
    Step("attention, q4_0 cache", 60, "programs", partial(operations, Q4_0_CACHE, report.attention_cases("q4_0", "q4_0"))),
    Step("attention, q8_0-q4_0 cache", 30, "programs", partial(operations, MIXED_CACHE, report.attention_cases("q8_0", "q4_0"))),
    Step("ceilings", 40, "programs", ceilings),
    Step("kernel speed", 40, "programs", kernel_speed),
    Step("memcheck", 60, "programs", partial(sanitizer, "memcheck")),
    Step("racecheck", 60, "programs", partial(sanitizer, "racecheck")),
    Step("imports", 60, "package", imports),
    Step("write wide layer", 10, "package", write_wide),
    *(Step(f"7b {kind}", 60, "package", partial(speed, "7b", kind)) for kind in TYPES),
    *(Step(f"1b {kind}", 30, "package", partial(speed, "1b", kind)) for kind in TYPES),
    Step("products", 60, "package", products),
    Step("start conversions", 10, "model", start_conversions),
    Step("convert", 120, "model", convert),
    *(Step(f"logits {name}", 60, "model", partial(logits, name)) for name in LOGITS),
    Step("learned", 60, "model", learned),
    Step("convert wide layer", 150, "model", convert_wide),
)
