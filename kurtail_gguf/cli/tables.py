"""Tables of what was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kurtail_gguf.measure.compare import Comparison
from kurtail_gguf.measure.evaluate import ModelResult, Report
from kurtail_gguf.measure.mmlu import Accuracy
from kurtail_gguf.measure.retrieval import GUESS, Cell, RetrievalResult


def print_report(report: Report, console: Console) -> None:
    """Print a row a file and cache type, the reference first, and MMLU, tasks and retrieval in detail."""
    rows = _rows(report)
    console.print(_overview(rows))
    if any(row.mmlu for _, row in rows):
        console.print(_subjects(rows))
    if any(row.tasks for _, row in rows):
        console.print(_tasks(rows))
    if any(row.retrieval for _, row in rows):
        console.print(_retrieval(rows))


def retrieval_panels(report: Report) -> dict[str, RetrievalResult]:
    """What was found again, under the names that the columns of a table have."""
    found = [(name, row.retrieval) for name, row in _rows(report) if row.retrieval is not None]
    heads = _heads(name for name, _ in found)
    return {heads[name]: result for name, result in found}


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print a row a method, the reference first."""
    rows = [("reference", comparison.reference, None)]
    rows += [(row.method.name, row.measured, row.cost) for row in comparison.methods]
    columns = {
        "perplexity": [perplexity(row) for _, row, _ in rows],
        "KLD": [kld(row) for _, row, _ in rows],
        "top-1": [top1(row) for _, row, _ in rows],
        "seconds": ["" if cost is None else f"{cost.seconds:.1f}" for *_, cost in rows],
        "peak MB": ["" if cost is None else f"{cost.peak_bytes / 1e6:.0f}" for *_, cost in rows],
    }
    table = _table("method", [name for name, *_ in rows], columns)
    bits = ", ".join(dict.fromkeys(row.runs_as for _, row, cost in rows if cost is not None))
    table.caption = f"{comparison.reference.path} as {bits}; seconds and memory of the conversion"
    console.print(table)


def _rows(report: Report) -> list[tuple[str, ModelResult]]:
    first = [] if report.reference is None else [("reference", report.reference)]
    return first + [(model.name, model) for model in report.models]


def _overview(rows: list[tuple[str, ModelResult]]) -> Table:
    columns = {
        "perplexity": [perplexity(row) for _, row in rows],
        "KLD": [kld(row) for _, row in rows],
        "top-1": [top1(row) for _, row in rows],
        "cache KLD": ["" if row.cache_kld is None else f"{row.cache_kld:.4f}" for _, row in rows],
        "cache ppl": ["" if row.cache_perplexity is None else f"× {row.cache_perplexity:.4f}" for _, row in rows],
        "MMLU": ["" if row.mmlu is None else percent(row.mmlu.micro) for _, row in rows],
        "bits/w": [f"{row.bits_per_weight:.2f}" for _, row in rows],
        "runs as": [row.runs_as for _, row in rows],
    }
    table = _table("file", [name for name, _ in rows], columns)
    if any(row.cache_kld is not None for _, row in rows):
        table.caption = "cache KLD, cache ppl: relative to the same file with an f16 cache"
    return table


def _subjects(rows: list[tuple[str, ModelResult]]) -> Table:
    asked = [(name, row.mmlu) for name, row in rows if row.mmlu is not None]
    first = asked[0][1]
    names = [*first.subjects, "macro average", "micro average"]
    columns = {"questions": [str(subject.questions) for subject in first.subjects.values()] + ["", ""]}
    columns["questions"][-1] = str(first.micro.questions)
    heads = _heads(name for name, _ in asked)
    for name, result in asked:
        columns[heads[name]] = [percent(part) for part in (*result.subjects.values(), result.macro, result.micro)]
    table = _table("MMLU", names, columns)
    table.caption = f"{first.shots} examples per question; accuracy ± standard error"
    if shortened := max(result.shortened for _, result in asked):
        table.caption += f"; {shortened} questions with fewer, because the context is too short"
    return table


def _tasks(rows: list[tuple[str, ModelResult]]) -> Table:
    """lm-eval's metrics, a row each; every file ran the same tasks."""
    ran = [(name, row.tasks) for name, row in rows if row.tasks is not None]
    metrics = ran[0][1].metrics()
    columns = {"metric": [f"{metric.name}, {metric.filter}" for metric in metrics]}
    heads = _heads(name for name, _ in ran)
    for name, result in ran:
        columns[heads[name]] = [metric.text for metric in result.metrics()]
    table = _table("task", [metric.task for metric in metrics], columns)
    table.caption = f"lm-eval {ran[0][1].version}; value ± standard error"
    return table


def _retrieval(rows: list[tuple[str, ModelResult]]) -> Table:
    """Codes found, a row for each length and depth; every file was asked for the same."""
    asked = [(name, row.retrieval) for name, row in rows if row.retrieval is not None]
    cells = asked[0][1].cells
    columns = {"depth": [*(f"{100 * cell.depth:g} %" for cell in cells), ""]}
    heads = _heads(name for name, _ in asked)
    for name, result in asked:
        columns[heads[name]] = [*(cell_text(cell) for cell in result.cells), retrieved(result)]
    table = _table("context", [*(str(cell.length) for cell in cells), "all"], columns)
    table.caption = f"correct codes, and mean log-likelihood of the right code in nats; guessing gives {GUESS:.1f}"
    return table


def _heads(paths: Iterable[str]) -> dict[str, str]:
    """Heads of the files' columns by path: the file's name, or the path where another file has the same name."""
    names = {path: Path(path).name for path in paths}
    count = Counter(names.values())
    return {path: name if count[name] == 1 else path for path, name in names.items()}


def _table(head: str, names: list[str], columns: dict[str, list[str]]) -> Table:
    """A table without the columns in which nothing stands."""
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    table = Table()
    table.add_column(head, overflow="fold")
    for name in kept:
        table.add_column(name, justify="right", overflow="fold", no_wrap=len(name) < 12)
    for cells in zip(names, *kept.values(), strict=True):
        table.add_row(*cells)
    return table


def perplexity(row: ModelResult) -> str:
    """A cell; empty where it was not measured, as in all of these."""
    return "" if row.perplexity is None else f"{row.perplexity:.4f} ± {row.perplexity_stderr:.4f}"


def kld(row: ModelResult) -> str:
    """Mean KL divergence in nats."""
    return "" if row.kld_mean is None else f"{row.kld_mean:.4f}"


def top1(row: ModelResult) -> str:
    """Agreement on the likeliest token."""
    return "" if row.top1_agreement is None else f"{100 * row.top1_agreement:.2f} %"


def retrieved(result: RetrievalResult) -> str:
    """Share of the codes that were right, and their mean log-likelihood in nats."""
    return f"{100 * result.accuracy:.1f} % ({result.log_likelihood:.2f})"


def cell_text(cell: Cell) -> str:
    """The same of one length and depth, in numbers of codes."""
    return f"{cell.right}/{cell.facts} ({cell.log_likelihood:.2f})"


def percent(part: Accuracy) -> str:
    """An accuracy in percent, with its standard error where it has one."""
    error = "" if part.stderr is None else f" ± {100 * part.stderr:.1f}"
    return f"{100 * part.accuracy:.1f}{error} %"
