"""``kurtail-gguf eval FILE.gguf…``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from kurtail_gguf.cli.cards import check_cards, write_cards
from kurtail_gguf.cli.options import activation_bits, allow_pickle, comma_list
from kurtail_gguf.cli.output import check_writable, write_json
from kurtail_gguf.cli.progress import make_progress
from kurtail_gguf.messages.errors import ConfigError
from kurtail_gguf.runtime.cache_types import CACHE_BITS, CACHE_TYPES, FILE


def _cache_type(name: str) -> str:
    if name not in CACHE_TYPES:
        raise ValueError
    return name


@click.command("eval")
@click.argument("files", metavar="FILE.gguf...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--text", default=None, type=click.Path(path_type=Path), help="UTF-8 text to measure perplexity on.")
@click.option(
    "--context", type=click.IntRange(min=16), default=512, show_default=True,
    help="Tokens per chunk of the text; the second half of each chunk is scored.",
)
@click.option("--chunks", type=click.IntRange(min=1), default=None, help="Measure only the first N chunks.  [default: all]")
@click.option(
    "--mmlu", default=None, metavar="DIR", type=click.Path(path_type=Path),
    help="Measure MMLU with the questions in DIR/test/SUBJECT_test.csv and the examples in DIR/dev/SUBJECT_dev.csv.",
)
@click.option("--shots", type=click.IntRange(min=0), default=5, show_default=True, help="MMLU examples per question.")
@click.option(
    "--mmlu-limit", type=click.IntRange(min=1), default=None, help="Ask only the first N questions of each subject.  [default: all]",
)
@click.option(
    "--tasks", default=None, metavar="NAME,…",
    help="Run lm-eval tasks. Needs lm-eval (pip install 'kurtail-gguf[eval]') and the tasks' data.",
)
@click.option(
    "--include-path", default=None, metavar="DIR", type=click.Path(path_type=Path),
    help="Also search this directory for tasks' YAML files, which may name local data.",
)
@click.option("--task-shots", type=click.IntRange(min=0), default=None, help="Examples per task.  [default: the task's own]")
@click.option("--task-limit", type=click.IntRange(min=1), default=None, help="Run only the first N documents of each task.  [default: all]")
@click.option(
    "--retrieval", is_flag=True,
    help="Hide access codes in a long text and ask for them at its end: how many are found, and how likely the right ones are.",
)
@click.option(
    "--retrieval-text", default=None, type=click.Path(path_type=Path),
    help="UTF-8 text to hide the codes in.  [default: the one of --text]",
)
@click.option(
    "--retrieval-lengths", default="1024,2048,4096,8192", show_default=True, metavar="TOKENS,…", callback=comma_list(int),
    help="Context lengths, question and answer included.",
)
@click.option(
    "--retrieval-depths", default="0.1,0.5,0.9", show_default=True, metavar="SHARE,…", callback=comma_list(float),
    help="Positions of the codes: 0 is the beginning of the text, 1 its end.",
)
@click.option(
    "--retrieval-needles", type=click.IntRange(min=1), default=4, show_default=True,
    help="Codes per length and depth.",
)
@click.option("--retrieval-seed", type=int, default=0, show_default=True, help="Seed of the codes.")
@click.option(
    "--cache-type", multiple=True, default=(FILE,), show_default=True, metavar="TYPE,…", callback=comma_list(_cache_type),
    help=f"Measure with keys and values cached in each of these types: {FILE} (the file's own), {', '.join(CACHE_BITS)}.",
)
@activation_bits
@click.option(
    "--cache-share", is_flag=True,
    help="Measure on --text what each of these caches costs on its own: divergence from the same file with an f16 cache, and "
    "perplexity relative to it.",
)
@click.option(
    "--reference", default=None,
    help="Also measure this model, and the divergence from it: a Hugging Face directory, hf:owner/name, a GGUF file or a known "
    "model.",
)
@allow_pickle
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), default=None, help="Write the results to this file.",
)
@click.option(
    "--plot", type=click.Path(path_type=Path), default=None, metavar="PNG|SVG",
    help="Draw the results of --retrieval, by length and depth.",
)
@click.option("--card", is_flag=True, help="Write a model card FILE.gguf.md beside each file: what it is and what was measured.")
def eval_command(
    files: tuple[Path, ...], text: Path | None, mmlu: Path | None, tasks: str | None, reference: str | None,
    retrieval: bool, json_path: Path | None, plot: Path | None, card: bool, **options: Any,
) -> None:  # fmt: skip
    """Measure GGUF files with the shipped runtime.

    Perplexity (--text) is that of llama-perplexity, with the file's own cache types or those of --cache-type, and with the
    runtime's default bits of activations or those of --activation-bits. The table and the JSON report which were used.

    With --reference, the mean KL divergence from it (KLD, in nats) and how often both pick the same top token (top-1) are
    measured as well. --cache-share compares each file with itself with an f16 cache.

    MMLU (--mmlu) is the share of questions whose right answer is the likeliest of the four. Tasks (--tasks) are
    EleutherAI's, run by lm-eval on the shipped runtime. Retrieval (--retrieval) hides codes in a long text and asks for them at
    its end.
    """
    if text is None and mmlu is None and tasks is None and not retrieval and not options["cache_share"]:
        raise click.UsageError("nothing to measure: give --text FILE, --mmlu DIR, --tasks NAME or --retrieval")
    haystack = options["retrieval_text"] or text
    if retrieval and haystack is None:
        raise ConfigError("--retrieval needs a text to hide the codes in: give --retrieval-text or --text")
    if plot is not None and not retrieval:
        raise ConfigError("--plot draws the results of --retrieval: give --retrieval as well")
    for path, option in ((json_path, "--json"), (plot, "--plot")):
        if path is not None:
            check_writable(path, option)
    if card:
        check_cards(files)
    # click takes seconds to start where torch is imported, so --help does without
    from kurtail_gguf.cli.tables import print_report, retrieval_panels
    from kurtail_gguf.measure.evaluate import MmluRequest, Request, TextRequest, measure
    from kurtail_gguf.measure.harness import TasksRequest
    from kurtail_gguf.measure.outliers import check_picture
    from kurtail_gguf.measure.retrieval import RetrievalRequest
    from kurtail_gguf.measure.retrieval_plot import draw_retrieval

    if plot is not None:
        check_picture(plot)
    request = Request(
        text=None if text is None else TextRequest(text, options["context"], options["chunks"]),
        mmlu=None if mmlu is None else MmluRequest(mmlu, options["shots"], options["mmlu_limit"]),
        tasks=None if tasks is None else TasksRequest(
            tuple(tasks.split(",")), options["include_path"], options["task_shots"], options["task_limit"]
        ),
        retrieval=None if not retrieval else RetrievalRequest(
            haystack, options["retrieval_lengths"], options["retrieval_depths"], options["retrieval_needles"],
            options["retrieval_seed"],
        ),
        caches=options["cache_type"], cache_share=options["cache_share"], activations=options["activation_bits"],
    )  # fmt: skip
    report = measure(files, request, reference, make_progress(Console(stderr=True)), options["allow_pickle"])
    print_report(report, Console())
    if json_path is not None:
        write_json(json_path, report.to_json())
    if plot is not None:
        draw_retrieval(plot, retrieval_panels(report))
    if card:
        count = len(request.caches)
        rows = ((file, report.models[i * count : (i + 1) * count], ()) for i, file in enumerate(files))
        write_cards(rows, report.reference, request)
