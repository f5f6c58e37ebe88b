"""What tools/gpu_check reads from the programs it runs, and the table it prints. Text in, values out: no card needed."""

from __future__ import annotations

import math
import re
import signal

from environment import ToolError

COLOURS = re.compile(r"\x1b\[[0-9;]*m")

# Card and CPU add in another order, which roundings to 4 bits make large. Those of activations and cache alone put
# SmolLM2-135M, as nervous as models get, 0.22 nats from itself (docs/quality.md: weights 16-bit, R4 64); two runs that
# had none of them in common would be about twice that apart.
MAX_KLD = 0.5
# The order of sums moves the loss of a chunk by 0.044 up or down (docs/cpu.md), so the mean of four by 0.022: what is
# further off has lost something.
MAX_LOSS = 0.1
# To learn in another order is as good as with another seed, which moves the perplexity by up to ten percent (README);
# weights rounded to nearest instead of GPTQ's move it by 65 (docs/quality.md).
MAX_LEARNED = 0.2


def backend_ops_summary(text: str, device: str, status: int = 0, errors: str = "") -> dict[str, int]:
    """Counts of ``test-backend-ops test``: {"ok", "failed", "unsupported"}.

    Args:
        text: its standard output.
        device: it ran on.
        status: its exit status; negative where a signal ended it.
        errors: its standard error.

    Raises:
        ToolError: when no case ran, as where the device is not there, or when it ended before the last: a case that
            aborts leaves no line.
    """
    lines = COLOURS.sub("", text).splitlines()
    cases = [line for line in lines if re.search(r"(^|\s)[A-Z_0-9]+\(.*\):", line)]
    counts = {
        "ok": sum(line.rstrip().endswith("OK") for line in cases),
        "unsupported": sum("not supported" in line for line in cases),
    }
    counts["failed"] = len(cases) - counts["ok"] - counts["unsupported"]
    if status < 0 or (status > 0 and counts["ok"] and not counts["failed"]):
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        told = [line for line in errors.splitlines() if line.strip()] or lines or ["no output"]
        reason = next((line for line in told if "error" in line.lower()), told[-1])
        raise ToolError(f"test-backend-ops on {device} ended by {how}, {counts['ok']} passed: {reason.strip()}")
    if counts["ok"] + counts["failed"] == 0:
        raise ToolError(f"test-backend-ops ran nothing on {device}: {(lines or ['no output'])[-1].strip()}")
    return counts


def divergence(text: str) -> dict[str, float]:
    """Of ``llama-perplexity --kl-divergence``: mean KLD and loss against the base (nats), top-1 agreement (percent)."""
    kld = re.search(r"Mean\s+KLD:\s+(-?[\d.]+)", text)
    loss = re.search(r"Mean ln\(PPL\(Q\)/PPL\(base\)\)\s*:\s+(-?[\d.]+)", text)
    top = re.search(r"Same top p:\s+([\d.]+)", text)
    if kld is None or loss is None or top is None:
        raise ToolError("llama-perplexity printed no divergence")
    return {"kld": float(kld[1]), "loss": float(loss[1]), "top1": float(top[1])}


def perplexity(text: str) -> float:
    """What ``llama-perplexity`` ends with."""
    found = re.search(r"Final estimate: PPL = ([\d.]+)", text)
    if found is None:
        raise ToolError("llama-perplexity printed no perplexity")
    return float(found[1])


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


def complaints(result: dict) -> list[str]:
    """What of a result is beyond its limit, a line each."""
    wrong = []
    if failed := sum(counts["failed"] for counts in result["operations"].values()):
        command = f"test-backend-ops test -b {result['device']} -p kt4"
        wrong.append(f"{failed} operations differ from the CPU's: {command} lists them")
    if "logits" in result:
        kld, loss = result["logits"]["kld"], result["logits"]["loss"]
        if kld > MAX_KLD:
            wrong.append(f"logits: KLD {kld:.2g} nats from the CPU's, at most {MAX_KLD} is expected")
        if abs(loss) > MAX_LOSS:
            wrong.append(f"logits: loss {loss:+.3f} against the CPU's, at most {MAX_LOSS} either way is expected")
    if "learning" in result:
        card, cpu = result["learning"]["card"]["perplexity"], result["learning"]["cpu"]["perplexity"]
        if abs(math.log(card / cpu)) > math.log(1 + MAX_LEARNED):
            told = f"perplexity {card:.2f} learned on the card, {cpu:.2f} on the CPU"
            wrong.append(f"learning: {told}, at most {100 * MAX_LEARNED:.0f} % between them is expected")
    return wrong


def table(result: dict, base: str) -> str:
    """Markdown: products in microseconds and TOPS, models in tokens a second, with the ratio to ``base``'s speed."""
    lines = [f"{result['card']} ({result['device']}), {result['date']}", ""]
    kinds = list(next(iter(result["products us"].values())))
    lines += ["| rows x inputs x columns, us | " + " | ".join(kinds) + " | kt4 TOPS |", "|---" * (len(kinds) + 2) + "|"]
    for shape, times in result["products us"].items():
        rows, inputs, columns = map(int, shape.split("x"))
        cells = [f"{us:.4g} ({times[base] / us:.2f})" for us in times.values()]
        lines.append(f"| {shape} | " + " | ".join(cells) + f" | {2e-6 * rows * inputs * columns / times['kt4']:.1f} |")
    tests = list(next(iter(result["tokens/s"].values())))
    lines += ["", "| tokens/s | " + " | ".join(tests) + " |", "|---" * (len(tests) + 1) + "|"]
    for kind, speeds in result["tokens/s"].items():
        cells = [f"{speed:.4g} ({speed / result['tokens/s'][base][test]:.2f})" for test, speed in speeds.items()]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    if "logits" in result:
        kld, loss, top1 = (result["logits"][name] for name in ("kld", "loss", "top1"))
        told = f"KLD {kld:.2g} nats (at most {MAX_KLD}), loss {loss:+.3f} (±{MAX_LOSS}), top-1 {top1:.2f} %"
        lines += ["", f"logits against the CPU: {told}"]
    if "learning" in result:
        lines += ["", *_learning_table(result["learning"])]
    return "\n".join(lines)


def _learning_table(learning: dict) -> list[str]:
    """Seconds of convert's stages on the card and on the CPU, and the card's peaks."""
    card, cpu = learning["card"], learning["cpu"]
    stages = card.get("card_peak_bytes", {}).get("stages", {})
    lines = ["| convert, s | card | CPU | card's peak, GB |", "|---|---|---|---|"]
    for stage, seconds in card["seconds"].items():
        peak = f" {stages[stage]['reserved'] / 1e9:.2f}" if stage in stages else ""
        lines.append(f"| {stage} | {seconds:.1f} | {cpu['seconds'][stage]:.1f} |{peak} |")
    what = f"perplexity of the file (at most {100 * MAX_LEARNED:.0f} % apart)"
    return [*lines, f"| {what} | {card['perplexity']:.2f} | {cpu['perplexity']:.2f} | |"]
