"""``kurtail-gguf eval FILE.gguf…``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from kurtail_gguf.cli.cards import check_cards, write_cards
from kurtail_gguf.cli.output import check_writable, write_json
from kurtail_gguf.cli.options import allow_pickle
from kurtail_gguf.cli.progress import make_progress


@click.command("eval")
@click.argument("files", metavar="FILE.gguf...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--text", default=None, type=click.Path(path_type=Path), help="UTF-8 text to measure perplexity on.")
@click.option(
    "--context", type=click.IntRange(min=16), default=512, show_default=True,
    help="Tokens in a chunk of the text; the second half of each is scored.",
)
@click.option("--chunks", type=click.IntRange(min=1), default=None, help="Only the first so many chunks.")
@click.option(
    "--mmlu", default=None, metavar="DIR", type=click.Path(path_type=Path),
    help="Ask MMLU's questions from DIR/test/SUBJECT_test.csv, with examples from DIR/dev/SUBJECT_dev.csv.",
)
@click.option("--shots", type=click.IntRange(min=0), default=5, show_default=True, help="MMLU's examples a question.")
@click.option(
    "--mmlu-limit", type=click.IntRange(min=1), default=None, help="Only the first so many questions of a subject.",
)
@click.option(
    "--tasks", default=None, metavar="NAME,…",
    help="Run tasks of lm-eval, which must be installed (extra eval) and have their data at hand.",
)
@click.option(
    "--include-path", default=None, metavar="DIR", type=click.Path(path_type=Path),
    help="Also look for tasks' YAML files here; those may name local data.",
)
@click.option("--task-shots", type=click.IntRange(min=0), default=None, help="Examples a task; its own choice if not given.")
@click.option("--task-limit", type=click.IntRange(min=1), default=None, help="Only the first so many documents of a task.")
@click.option(
    "--reference", default=None,
    help="Measure this as well, and the divergence from it: a Hugging Face directory, a GGUF file or a known model.",
)
@allow_pickle
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), default=None, help="Write the results here.",
)
@click.option("--card", is_flag=True, help="Write FILE.gguf.md beside each file: what it is and what was measured.")
def eval_command(
    files: tuple[Path, ...], text: Path | None, mmlu: Path | None, tasks: str | None, reference: str | None,
    json_path: Path | None, card: bool, **options: Any,
) -> None:  # fmt: skip
    """Measure GGUF files with the shipped runtime.

    Perplexity (--text) is what llama-perplexity gives, with the cache that the file asks for. With a
    reference, the mean KL divergence from it (KLD, in nats) and how often both agree on the likeliest token
    (top-1) are measured as well. MMLU (--mmlu) is the share of questions whose right answer is the likeliest.
    Tasks (--tasks) are EleutherAI's, run by their own harness on the shipped runtime.
    """
    if text is None and mmlu is None and tasks is None:
        raise click.UsageError("nothing to measure: give --text FILE, --mmlu DIR or --tasks NAME")
    if json_path is not None:
        check_writable(json_path, "--json")
    if card:
        check_cards(files)
    # click takes seconds to start where torch is imported, so --help does without
    from kurtail_gguf.cli.tables import print_report
    from kurtail_gguf.evaluate.harness import TasksRequest
    from kurtail_gguf.measurement import MmluRequest, Request, TextRequest, measure

    request = Request(
        text=None if text is None else TextRequest(text, options["context"], options["chunks"]),
        mmlu=None if mmlu is None else MmluRequest(mmlu, options["shots"], options["mmlu_limit"]),
        tasks=None if tasks is None else TasksRequest(
            tuple(tasks.split(",")), options["include_path"], options["task_shots"], options["task_limit"]
        ),
    )  # fmt: skip
    console = Console(stderr=True)

    def tell(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    report = measure(files, request, reference, make_progress(console), tell, options["allow_pickle"])
    print_report(report, Console())
    if json_path is not None:
        write_json(json_path, report.to_json())
    if card:
        write_cards(((file, row, ()) for file, row in zip(files, report.models, strict=True)), report.reference, request)
