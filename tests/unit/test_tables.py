"""Tables on the terminal: which columns they have."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kurtail_gguf.cli.tables import print_report
from kurtail_gguf.measure.evaluate import ModelResult, Report
from kurtail_gguf.measure.harness import TasksResult
from kurtail_gguf.measure.mmlu import Accuracy, MmluResult


def _row(path: str, share: float) -> ModelResult:
    accuracy = Accuracy(share, None, 8)
    mmlu = MmluResult(5, 0, accuracy, accuracy, {"us_history": accuracy})
    tasks = TasksResult("0.4", {"arc": {"acc,none": share, "acc_stderr,none": 0.01}})
    return ModelResult(path, None, None, None, None, 4.9, 4, 4, "W4A4KV4", mmlu, tasks)


def _printed(*paths: str) -> str:
    rows = tuple(_row(path, (number + 1) / 8) for number, path in enumerate(paths))
    console = Console(file=io.StringIO(), width=200)
    print_report(Report(_row("smollm2", 1.0), rows), console)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("paths", "heads"),
    [
        (("a/out.gguf", "b/out.gguf"), ("a/out.gguf", "b/out.gguf")),
        (("out.gguf", "b/out.gguf"), ("out.gguf", "b/out.gguf")),
        (("a/out.gguf", "b/other.gguf"), ("out.gguf", "other.gguf")),
    ],
)
def test_every_file_has_a_column_of_its_own(paths, heads):
    _, _overview, subjects, tasks = _printed(*paths).split("┏")
    for table, first in ((subjects, ["MMLU", "questions"]), (tasks, ["task", "metric"])):
        head = next(line for line in table.splitlines() if line.startswith("┃"))
        assert [cell.strip() for cell in head.strip("┃").split("┃")] == [*first, "reference", *heads]
    assert "12.5 %" in subjects and "25.0 %" in subjects
    assert "0.1250 ± 0.0100" in tasks and "0.2500 ± 0.0100" in tasks
