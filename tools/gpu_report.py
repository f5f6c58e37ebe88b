"""What tools/gpu_run makes of the output of the programs it runs: values, complaints and tables. Text in, values out."""

from __future__ import annotations

import json
import math
import re
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from environment import ToolError

COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Limit:
    """How far a file's predictions on the GPU may be from the CPU's: mean divergence in nats, loss either way."""

    kld: float = math.inf
    loss: float = math.inf


# To learn in another order of sums is as good as with another seed, which moves the perplexity by up to ten percent (docs/limits.md);
# weights rounded to nearest instead of GPTQ's move it by 65 (docs/quality.md).
MAX_LEARNED = 0.2

# Of MUL_MAT and its relatives, a case of each must have run: a backend that supports none passes everything.
PRODUCTS = {
    "MUL_MAT, generation": r"^MUL_MAT\(type_a=kt4,type_b=f32,m=\d+,n=1,",
    "MUL_MAT, prompt": r"^MUL_MAT\(type_a=kt4,type_b=f32,m=\d+,n=(9|\d\d+),",
    "MUL_MAT_ID, generation": r"^MUL_MAT_ID\(type_a=kt4,type_b=f32,.*\bn=1,",
    "MUL_MAT_ID, prompt": r"^MUL_MAT_ID\(type_a=kt4,type_b=f32,.*\bn=(9|\d\d+),",
    "GET_ROWS": r"^GET_ROWS\(type=kt4,",
    "SET_ROWS": r"^SET_ROWS\(type_src=f32,type_dst=kt4,",
    "CPY": r"^CPY\(type_src=f32,type_dst=kt4,",
}


def attention_cases(k: str, v: str) -> dict[str, str]:
    """Cases of FLASH_ATTN_EXT that have to run over a cache of these types: generation and prompts, each head size.

    The kernel for generation takes caches of a multiple of 256 tokens.
    """
    types = f"type_K={k},type_V={v},"
    return {
        f"heads of {size}, {what}": rf"^FLASH_ATTN_EXT\(hsk={size},hsv={size},.*kv={kv},nb={nb},mask=1,.*{types}"
        for size in (64, 128, 256)
        for what, nb, kv in (("generation", "1", r"(512|1024|4096)"), ("prompt", r"(32|64)", r"\d+"))
    }


@dataclass(frozen=True)
class Case:
    """A case of test-backend-ops: ``name`` as it prints it, ``state`` "ok", "failed" or "unsupported"."""

    name: str
    state: str


def backend_cases(text: str, device: str, status: int = 0, errors: str = "") -> list[Case]:
    """Cases of ``test-backend-ops test``.

    Args:
        text: its standard output.
        device: it ran on.
        status: its exit status; negative where a signal ended it.
        errors: its standard error.

    Raises:
        ToolError: when no case ran, as where the device is missing, or when the program ended before the last: a case
            that aborts leaves no line.
    """
    lines = COLOURS.sub("", text).splitlines()
    cases = []
    for line in lines:
        if found := re.search(r"(?:^|\s)([A-Z][A-Z_0-9]*\(.*\)): (.*)$", line):
            told = found[2].rstrip()
            cases.append(Case(found[1], "ok" if told.endswith("OK") else "unsupported" if "not supported" in told else "failed"))
    passed = sum(case.state == "ok" for case in cases)
    failed = sum(case.state == "failed" for case in cases)
    if status < 0 or (status > 0 and passed and not failed):
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        raise ToolError(f"test-backend-ops on {device} ended by {how}, {passed} passed: {reason(errors, text)}")
    if passed + failed == 0:
        raise ToolError(f"test-backend-ops ran nothing on {device}: {(lines or ['no output'])[-1].strip()}")
    return cases


def counts(cases: Iterable[Case]) -> dict[str, dict[str, int]]:
    """How many of each operation are in which state: {"MUL_MAT": {"ok", "failed", "unsupported"}}."""
    found: dict[str, dict[str, int]] = {}
    for case in cases:
        states = found.setdefault(case.name.partition("(")[0], {"ok": 0, "failed": 0, "unsupported": 0})
        states[case.state] += 1
    return found


def case_complaints(cases: list[Case], demanded: Mapping[str, str], device: str) -> list[str]:
    """Failed cases, and what was demanded (a name and a pattern of cases) and never passed."""
    wrong = []
    if failed := [case.name for case in cases if case.state == "failed"]:
        wrong.append(f"{len(failed)} cases differ from the CPU's, the first: {failed[0]}")
    for what, pattern in demanded.items():
        states = [case.state for case in cases if re.search(pattern, case.name)]
        if "ok" not in states and "failed" not in states:
            how = "is not supported" if states else "has no case"
            wrong.append(f"{what} was not tested: it {how} on {device}")
    return wrong


def kernel_checks(text: str, status: int, errors: str = "") -> dict[str, int]:
    """Of test-kt4-gpu: {"checks", "failures"}, and "s4" 1 where kernels for int4 matrix units were among them.

    Raises:
        ToolError: when it ended before its last line.
    """
    found = re.search(r"^(\d+) checks, (\d+) failures$", text, flags=re.M)
    if found is None:
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        raise ToolError(f"the kernels' test ended by {how}: {reason(errors, text)}")
    if int(found[1]) == 0:
        raise ToolError("the kernels' test checked nothing")
    return {"checks": int(found[1]), "failures": int(found[2]), "s4": int("s4: not tested" not in text)}


def sanitizer_errors(text: str) -> int:
    """Errors that compute-sanitizer counted.

    Raises:
        ToolError: when it printed no count: it did not run to its end, or refused the device.
    """
    found = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+) (?:error|hazard)", text)
    if not found:
        raise ToolError(f"compute-sanitizer printed no summary: {reason(text)}")
    return sum(map(int, found))


def divergence(text: str) -> dict[str, float]:
    """Of ``llama-perplexity --kl-divergence``: mean KLD and loss against the base (nats), top-1 agreement (percent)."""
    kld = re.search(r"Mean\s+KLD:\s+(-?[\d.]+)", text)
    loss = re.search(r"Mean ln\(PPL\(Q\)/PPL\(base\)\)\s*:\s+(-?[\d.]+)", text)
    top = re.search(r"Same top p:\s+([\d.]+)", text)
    if kld is None or loss is None or top is None:
        raise ToolError("llama-perplexity printed no divergence")
    return {"kld": float(kld[1]), "loss": float(loss[1]), "top1": float(top[1])}


def divergence_complaints(found: Mapping[str, float], limit: Limit) -> list[str]:
    """What is beyond its limit; NaN is."""
    wrong = []
    if not found["kld"] <= limit.kld:
        wrong.append(f"KLD {found['kld']:.3g} nats from the CPU's, at most {limit.kld} is expected")
    if not abs(found["loss"]) <= limit.loss:
        wrong.append(f"loss {found['loss']:+.4f} against the CPU's, at most {limit.loss} either way is expected")
    return wrong


@dataclass(frozen=True)
class Placement:
    """Where llama.cpp put a model: MiB of weights by buffer, and the most splits of a graph."""

    weights: dict[str, float]
    splits: int


def placement(log: str) -> Placement:
    """From the log of a program with ``-lv 4``.

    Raises:
        ToolError: when the log has no line of it.
    """
    weights: dict[str, float] = {}
    for name, size in re.findall(r"(\S+) model buffer size =\s+([\d.]+) MiB", log):
        weights[name] = weights.get(name, 0.0) + float(size)
    splits = [int(n) for found in re.findall(r"graph.*?: nodes = .*?, splits = ([\d /]+),", log) for n in found.split("/")]
    if not weights or not splits:
        raise ToolError("the log does not contain the buffers of the model")
    return Placement(weights, max(splits))


def placement_complaints(found: Placement, device: str, kt4_bytes: int) -> list[str]:
    """What of a model that should be on a device is elsewhere.

    Args:
        found: where it is.
        device: ggml's name of it.
        kt4_bytes: of the file's weights that are multiplied.
    """
    wrong = []
    held = found.weights.get(f"{device}_KT4", 0.0)
    expected = kt4_bytes / 2**20
    if held + 0.01 < 0.99 * expected:  # the log rounds to hundredths
        wrong.append(f"{held:.2f} MiB of weights are in {device}_KT4, {expected:.2f} MiB are expected: products are computed elsewhere")
    # the embedding's rows are read on the CPU: a split of its own, where the rest is elsewhere
    most = 1 if device == "CPU" else 2
    if found.splits > most:
        wrong.append(f"graphs have {found.splits} splits, at most {most} are expected: operations run on the CPU")
    return wrong


def perplexity(text: str) -> float:
    """What ``llama-perplexity`` ends with."""
    found = re.search(r"Final estimate: PPL = ([\d.]+)", text)
    if found is None:
        raise ToolError("llama-perplexity printed no perplexity")
    return float(found[1])


def learning_complaints(gpu: float, cpu: float) -> list[str]:
    """Of the perplexities of two files that were learned on the GPU and on the CPU."""
    if abs(math.log(gpu / cpu)) <= math.log(1 + MAX_LEARNED):
        return []
    return [f"perplexity {gpu:.2f} learned on the GPU, {cpu:.2f} on the CPU: at most {100 * MAX_LEARNED:.0f} % between them is expected"]


def operation_numbers(header: str) -> dict[str, int]:
    """Numbers of ggml's operations, from the text of ggml.h."""
    body = re.search(r"enum ggml_op \{(.*?)\};", header, flags=re.S)
    if body is None:
        raise ToolError("ggml.h has no enum ggml_op")
    return {name: i for i, name in enumerate(re.findall(r"\b(GGML_OP_\w+)", re.sub(r"//.*", "", body[1])))}


def product_line(operation: int, kind: str, number: int, values: int, size: int, rows: int, inputs: int, columns: int) -> str:
    """A product as a line of test-backend-ops' test files: f32 [rows, columns] = weights [inputs, rows] x f32 [inputs, columns].

    number, values, size: ggml's number of the weights' type, values and bytes of its block.
    """
    row = inputs // values * size
    weights = f"{number} {inputs} {rows} 1 1 {size} {row} {row * rows} {row * rows}"
    x = f"0 {inputs} {columns} 1 1 4 {4 * inputs} {4 * inputs * columns} {4 * inputs * columns}"
    return f"{operation} 0 {rows} {columns} 1 1 0 2 {weights} {x} product-{kind}-{rows}x{inputs}x{columns}"


def product_times(text: str) -> dict[str, dict[str, float]]:
    """Microseconds of ``test-backend-ops perf`` on such a file: {"ROWSxINPUTSxCOLUMNS": {type: us}}."""
    times: dict[str, dict[str, float]] = {}
    for kind, shape, us in re.findall(r"name=product-(\w+)-(\d+x\d+x\d+),.*?([\d.]+) us/run", COLOURS.sub("", text)):
        times.setdefault(shape, {})[kind] = float(us)
    if not times:
        raise ToolError("test-backend-ops measured no product")
    return times


def json_lines(text: str) -> list[dict]:
    """The JSON objects of a text, one a line; other lines are left out, a last one that was cut off as well."""
    found = []
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def bench_speeds(text: str) -> dict[str, float]:
    """Tokens a second of ``llama-bench -o jsonl``: {"pp512", "pp2048@4096 ub2048", "tg64@4096"}."""
    speeds = {}
    for line in json_lines(text):
        name = f"pp{line['n_prompt']}" if line["n_prompt"] else f"tg{line['n_gen']}"
        name += f"@{line['n_depth']}" if line["n_depth"] else ""
        name += f" ub{line['n_ubatch']}" if line["n_prompt"] else ""
        speeds[name] = max(line["avg_ts"], speeds.get(name, 0.0))  # generation does not know ubatches
    return speeds


def reason(*texts: str) -> str:
    """The line that tells most of why a program ended: the first that names an error, or the last there is."""
    for text in texts:
        if told := [line.strip() for line in COLOURS.sub("", text).splitlines() if line.strip()]:
            return next((line for line in told if re.search(r"(?i:\berror\b)|\w+Error: ", line)), told[-1])
    return "no output"
