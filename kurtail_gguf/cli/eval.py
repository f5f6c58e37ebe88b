"""``kurtail-gguf eval FILE.gguf… --text FILE``."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from kurtail_gguf.cli.progress import make_progress
from kurtail_gguf.errors import KurtailError
from kurtail_gguf.progress import Progress

if TYPE_CHECKING:
    from kurtail_gguf.gguf_info import GgufInfo

_VOCABULARY = "tokenizer.ggml.tokens"


@dataclass(frozen=True, slots=True)
class ModelResult:
    """One file's row; None is what was not measured or does not apply. Field names are the JSON's."""

    path: str
    perplexity: float
    perplexity_stderr: float
    kld_mean: float | None
    top1_agreement: float | None
    bits_per_weight: float
    activation_bits: int | None
    kv_bits: int
    runs_as: str


@click.command("eval")
@click.argument("files", metavar="FILE.gguf...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--text", required=True, type=click.Path(path_type=Path), help="UTF-8 text to measure on.")
@click.option(
    "--context", type=click.IntRange(min=16), default=512, show_default=True,
    help="Tokens in a chunk; the second half of each is scored.",
)
@click.option("--chunks", type=click.IntRange(min=1), default=None, help="Only the first so many chunks.")
@click.option(
    "--reference", default=None,
    help="Also measure the divergence from this: a Hugging Face directory, a GGUF file or a known model.",
)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), default=None, help="Write the results here.",
)  # fmt: skip
def eval_command(
    files: tuple[Path, ...], text: Path, context: int, chunks: int | None, reference: str | None, json_path: Path | None
) -> None:
    """Measure the perplexity of GGUF files with the shipped runtime.

    Perplexity is what llama-perplexity gives, with the cache that the file asks for. With a reference,
    the mean KL divergence from it (KLD, in nats) and how often both agree on the likeliest token (top-1)
    are measured as well.
    """
    from kurtail_gguf.gguf_info import read_gguf

    _check_text(text)
    if json_path is not None:
        _check_writable(json_path)
    infos = [read_gguf(path) for path in files]
    console = Console(stderr=True)
    progress = make_progress(console)
    if reference is None:
        results = [_measure(info, text, context, chunks, progress) for info in infos]
        rows = results
    else:
        of_reference, results = _compare(infos, reference, text, context, chunks, progress, console)
        rows = [of_reference, *results]
    Console().print(_table(rows, divergence=reference is not None))
    if json_path is not None:
        _write_json(json_path, results)


def _measure(info: GgufInfo, text: Path, context: int, chunks: int | None, progress: Progress) -> ModelResult:
    from kurtail_gguf.evaluate import perplexity

    measured = perplexity(info.path, text, context, chunks, progress)
    return _result(info, measured.value, measured.stderr)


def _compare(
    infos: list[GgufInfo], name: str, text: Path, context: int, chunks: int | None, progress: Progress, console: Console
) -> tuple[ModelResult, list[ModelResult]]:
    from kurtail_gguf import evaluate
    from kurtail_gguf.evaluate.perplexity import check_scored

    check_scored(context, chunks)

    def tell(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    with ExitStack() as stack:
        reference = _reference(name, stack, progress, tell)
        _check_vocabularies(infos, reference)
        vocabulary = _vocabulary_size(reference)
        opened = stack.enter_context(
            evaluate.reference(reference.path, vocabulary, text, context, chunks, progress, tell)
        )
        results = []
        for info in infos:
            measured = evaluate.divergence(info.path, opened, text, chunks, progress)
            own = measured.perplexity
            results.append(_result(info, own.value, own.stderr, measured.kld_mean, measured.top1_agreement))
        of_reference = _result(reference, opened.perplexity.value, opened.perplexity.stderr)
    return of_reference, results


def _reference(name: str, stack: ExitStack, progress: Progress, tell: object) -> GgufInfo:
    """The reference as a GGUF file; a checkpoint is exported to a temporary one."""
    from kurtail_gguf.export import export_reference, read_gguf
    from kurtail_gguf.loading.source import resolve_source

    path = Path(name)
    if path.is_file():
        return read_gguf(path)
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kurtail-reference-")))
    source = resolve_source(name, directory, progress)
    exported = directory / "reference.gguf"
    with progress.stage(f"export {name}", 1) as stage:
        export_reference(source, exported)
        stage.advance()
    return read_gguf(exported)


def _check_vocabularies(infos: list[GgufInfo], reference: GgufInfo) -> None:
    # llama-perplexity goes on with a reference of another vocabulary, and compares garbage
    for info in infos:
        if info.metadata.get(_VOCABULARY) != reference.metadata.get(_VOCABULARY):
            raise KurtailError(f"{info.path} and the reference have different vocabularies: no divergence exists")


def _vocabulary_size(info: GgufInfo) -> int:
    tokens = info.metadata.get(_VOCABULARY)
    if tokens is None:
        raise KurtailError(f"{info.path} has no vocabulary: give a complete model as reference")
    return int(tokens["length"]) if isinstance(tokens, dict) else len(tokens)


def _result(
    info: GgufInfo, value: float, stderr: float, kld_mean: float | None = None, top1_agreement: float | None = None
) -> ModelResult:
    bits = info.bits_per_weight, *info.runtime_bits
    return ModelResult(str(info.path), value, stderr, kld_mean, top1_agreement, *bits, info.runs_as)


def _table(rows: list[ModelResult], divergence: bool) -> Table:
    """Rows of the results; with a divergence, the first is the reference."""
    table = Table()
    table.add_column("file", overflow="fold")
    for name in ("perplexity", *(("KLD", "top-1") if divergence else ()), "bits/w", "runs as"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, row in enumerate(rows):
        cells = ["reference" if divergence and number == 0 else row.path]
        cells.append(f"{row.perplexity:.4f} ± {row.perplexity_stderr:.4f}")
        if divergence:
            cells.append("" if row.kld_mean is None else f"{row.kld_mean:.4f}")
            cells.append("" if row.top1_agreement is None else f"{100 * row.top1_agreement:.2f} %")
        cells.append(f"{row.bits_per_weight:.2f}")
        cells.append(row.runs_as)
        table.add_row(*cells)
    return table


def _check_text(text: Path) -> None:
    try:
        with text.open("rb") as file:
            if not file.read(1):
                raise KurtailError(f"{text} is empty: give a text to measure on")
    except OSError as error:
        raise KurtailError(f"cannot read {text}: {error.strerror}") from None


def _check_writable(path: Path) -> None:
    parent = path.absolute().parent
    if path.is_dir() or not os.access(path if path.exists() else parent, os.W_OK):
        raise KurtailError(f"cannot write {path}: no directory to write in, or no permission: choose another --json")


def _write_json(path: Path, results: list[ModelResult]) -> None:
    content = json.dumps({"models": [asdict(result) for result in results]}, indent=2, allow_nan=False)
    try:
        path.write_text(content + "\n", encoding="utf-8")
    except OSError as error:
        raise KurtailError(f"cannot write {path}: {error.strerror}") from None
