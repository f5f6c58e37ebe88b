"""What tools/gpu_check reads from the programs it runs, and the table it prints. Text in, values out: no card needed."""

from __future__ import annotations

import re

from environment import ToolError

COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def backend_ops_summary(text: str, device: str) -> dict[str, int]:
    """Counts of ``test-backend-ops test``: {"ok", "failed", "unsupported"}.

    Raises:
        ToolError: when no case ran, as where the device is not there.
    """
    lines = COLOURS.sub("", text).splitlines()
    cases = [line for line in lines if re.search(r"(^|\s)[A-Z_0-9]+\(.*\):", line)]
    counts = {
        "ok": sum(line.rstrip().endswith("OK") for line in cases),
        "unsupported": sum("not supported" in line for line in cases),
    }
    counts["failed"] = len(cases) - counts["ok"] - counts["unsupported"]
    if counts["ok"] + counts["failed"] == 0:
        raise ToolError(f"test-backend-ops ran nothing on {device}: {(lines or ['no output'])[-1].strip()}")
    return counts


def divergence(text: str) -> dict[str, float]:
    """Mean KLD in nats and top-1 agreement in percent of ``llama-perplexity --kl-divergence``."""
    kld = re.search(r"Mean\s+KLD:\s+(-?[\d.]+)", text)
    top = re.search(r"Same top p:\s+([\d.]+)", text)
    if kld is None or top is None:
        raise ToolError("llama-perplexity printed no divergence")
    return {"kld": float(kld[1]), "top1": float(top[1])}


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
        lines += ["", f"logits against the CPU: KLD {result['logits']['kld']:.2g} nats, top-1 {result['logits']['top1']:.2f} %"]
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
    return [*lines, f"| perplexity of the file | {card['perplexity']:.2f} | {cpu['perplexity']:.2f} | |"]
