"""The tables that tools/gpu_run ends with, from the lines of its results. Values in, Markdown out."""

from __future__ import annotations

BASE = "q4_0"


def tables(lines: list[dict]) -> str:
    """All of them; those without a result are left out."""
    found = {line["step"]: line.get("result") or {} for line in lines}
    parts = [_steps(lines), _speeds(found), _products(found), _kernels(found), _conversions(found)]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _head(*cells: object) -> list[str]:
    return [_row(*cells), "|---" * len(cells) + "|"]


def _steps(lines: list[dict]) -> list[str]:
    return _head("step", "", "s", "") + [_row(line["step"], line["status"], line["seconds"], _told(line)) for line in lines]


def _told(line: dict) -> str:
    """What is wrong, or the figures of a result that are short."""
    if line["why"]:
        return "; ".join(line["why"]).replace("|", "/")
    result = line.get("result") or {}
    return ", ".join(f"{name} {_short(value)}" for name, value in result.items() if isinstance(value, (int, float, str))).replace("|", "/")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _speeds(found: dict[str, dict]) -> list[str]:
    """Tokens a second of the random models; in brackets the ratio to Q4_0's."""
    text: list[str] = []
    for shape in ("7b", "1b"):
        by_type = {name.split()[1]: result["tokens_per_s"] for name, result in found.items() if name.startswith(f"{shape} ") and result.get("tokens_per_s")}
        tests = list(dict.fromkeys(test for speeds in by_type.values() for test in speeds))
        if not tests:
            continue
        text += [""] if text else []
        text += _head(f"{shape}, tokens/s", *tests)
        for kind, speeds in by_type.items():
            base = by_type.get(BASE, {})
            text.append(_row(kind, *(_with_ratio(speeds.get(test), base.get(test)) for test in tests)))
    return text


def _with_ratio(value: float | None, base: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g} ({value / base:.2f})" if base else f"{value:.4g}"


def _products(found: dict[str, dict]) -> list[str]:
    """Microseconds of single products; in brackets how many times as fast as Q4_0's."""
    times = found.get("products", {}).get("us")
    if not times:
        return []
    kinds = list(dict.fromkeys(kind for by_type in times.values() for kind in by_type))
    text = _head("rows x inputs x columns, us", *kinds, "kt4 TOPS")
    for shape, by_type in times.items():
        rows, inputs, columns = map(int, shape.split("x"))
        cells = []
        for kind in kinds:
            us, base = by_type.get(kind), by_type.get(BASE)
            cells.append("" if us is None else f"{us:.4g} ({base / us:.2f})" if base else f"{us:.4g}")
        text.append(_row(shape, *cells, f"{2e-6 * rows * inputs * columns / by_type['kt4']:.1f}" if "kt4" in by_type else ""))
    return text


def _kernels(found: dict[str, dict]) -> list[str]:
    """Kernels in production: weights in groups."""
    measured = found.get("kernel speed", {}).get("kernels")
    if not measured:
        return []
    return _head("kernel", "rows x inputs x columns", "us", "TB/s", "TOPS") + [
        _row(one["kernel"], f"{one['rows']}x{one['inputs']}x{one['columns']}", f"{one['us']:.4g}", f"{one['tb_per_s']:.3g}", f"{one['tops']:.4g}")
        for one in measured
    ]


def _conversions(found: dict[str, dict]) -> list[str]:
    """Seconds of convert's stages, and what of the GPU's memory they took."""
    text: list[str] = []
    cpu = found.get("learned", {}).get("seconds_cpu", {})
    for name in ("convert", "convert wide layer"):
        result = found.get(name, {})
        if "seconds" not in result:
            continue
        stages = (result.get("card_peak_bytes") or {}).get("stages", {})
        beside = cpu if name == "convert" else {}
        text += [""] if text else []
        text += _head(f"{name}, s", "GPU", "CPU", "GPU's peak, GB")
        for stage, seconds in result["seconds"].items():
            peak = f"{stages[stage]['reserved'] / 1e9:.2f}" if stage in stages else ""
            text.append(_row(stage, f"{seconds:.1f}", f"{beside[stage]:.1f}" if stage in beside else "", peak))
    return text
