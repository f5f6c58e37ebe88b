"""Draws bench.json of tools/bench: speed relative to stock's Q4_0, one panel a shape. Arguments: the JSON, the picture."""

import json
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure

BASE = "Q4_0"
NO_SPEEDS = ("load s", "MiB")


def main(source: Path, target: Path) -> None:
    results_by_shape = json.loads(source.read_text())["results"]
    figure = Figure(figsize=(6 * len(results_by_shape), 4), layout="constrained")
    panels = figure.subplots(1, len(results_by_shape), squeeze=False)[0]
    for axes, (shape, results) in zip(panels, results_by_shape.items(), strict=True):
        tests = [column for column in results[BASE] if column not in NO_SPEEDS]
        width = 0.8 / len(results)
        for i, (name, values) in enumerate(results.items()):
            ratios = [statistics.median(values[t]) / statistics.median(results[BASE][t]) if t in values else 0 for t in tests]
            axes.bar([x + i * width for x in range(len(tests))], ratios, width, label=name)
        axes.set_xticks([x + 0.4 - width / 2 for x in range(len(tests))], tests)
        axes.axhline(1.0, color="black", linewidth=0.5)
        axes.set_title(f"{shape}: tokens a second, stock's Q4_0 = 1")
        axes.legend()
    figure.savefig(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
