"""The quality card, ``FILE.gguf.md``: what a file is, what was measured of it, where, and how to repeat it."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from kurtail_gguf.files.atomic import file_sha256, write_atomically
from kurtail_gguf.measure.evaluate import ModelResult, Request
from kurtail_gguf.measure.mmlu import Accuracy
from kurtail_gguf.measure.retrieval import GUESS, Cell
from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.runtime.cache_types import with_cache
from kurtail_gguf.runtime.gguf_info import online_parts
from kurtail_gguf.runtime.provenance import TOOL


@dataclass(frozen=True, slots=True)
class Circumstances:
    """Where, when and how the measuring was done.

    Args:
        request: what was measured.
        command: the command line that measured it, program first.
        machine: one line.
        when: with a time zone.
    """

    request: Request
    command: tuple[str, ...]
    machine: str
    when: datetime


def card_path(file: Path) -> Path:
    """Where a file's card lies."""
    return file.with_name(file.name + ".md")


def check_card(file: Path) -> None:
    """Refuse, before any work, a card that cannot be written.

    Raises:
        KurtailError: no permission, or a directory of that name.
    """
    path = card_path(file)
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise KurtailError(f"the model card {path} cannot be written: no permission, or a directory of that name exists")


def write_card(file: Path, text: str) -> Path:
    """Write a card beside its file, complete or not at all; returns where."""
    path = card_path(file)
    try:
        write_atomically(path, text)
    except OSError as error:
        raise KurtailError(f"cannot write {path}: {error.strerror}") from None
    return path


def render(
    file: Path,
    summary: Mapping[str, Any],
    runs_as: str,
    models: Sequence[ModelResult],
    reference: ModelResult | None,
    circumstances: Circumstances,
    made_by: Sequence[str] = (),
) -> str:
    """A file's card in Markdown.

    Args:
        file: the GGUF file.
        summary: what ``kurtail-gguf inspect --json`` says about it.
        runs_as: the file with its own cache, as ``inspect`` says it.
        models: what was measured of it, once for each cache type.
        reference: the same of the reference, or None.
        circumstances: of the measuring.
        made_by: the conversion's command line, where it is known.
    """
    parts = [
        f"# {file.name}",
        _table(("", ""), identity(file, summary, runs_as, made_by)),
        "## Measured",
        _figures(models, reference),
        *_activations(models),
        *_conditions(circumstances.request, models[0].tasks.version if models[0].tasks else ""),
        f"Measured through the shipped runtime on {circumstances.when.isoformat(timespec='seconds')} by {TOOL} on "
        f"{circumstances.machine}. To repeat it:",
        f"```\n{shlex.join(circumstances.command)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def describe_machine() -> str:
    """The processor's name and how many CPUs the process may use."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{_cpu_name()}, {cpus} thread{'s' if cpus > 1 else ''}, {platform.system()}"


def mmlu_sha256(directory: Path) -> str:
    """Hex digest of a directory of questions: of the lines ``DIGEST  NAME`` of its files, as sha256sum writes them."""
    paths = sorted([*(directory / "dev").glob("*_dev.csv"), *(directory / "test").glob("*_test.csv")])
    lines = "".join(f"{file_sha256(path)}  {path.parent.name}/{path.name}\n" for path in paths)
    return hashlib.sha256(lines.encode()).hexdigest()


def identity(
    file: Path, summary: Mapping[str, Any], runs_as: str, made_by: Sequence[str]
) -> list[tuple[str, str]]:
    """What a file is, as rows of a name and a text in which hashes and commands stand between backticks.

    The arguments are those of :func:`render`; ``runs_as`` is as ``inspect`` says it.
    """
    block = summary["block_bits_per_weight"]
    types = (f"{name} ({total['tensors']} tensors, {total['bytes']:,} bytes)" for name, total in summary["types"].items())
    rows = [
        ("model", f"{summary['name'] or 'unnamed'}, {summary['architecture']}, {summary['parameters'] / 1e6:.1f} M values"),
        ("file", f"{file.stat().st_size:,} bytes, sha256 `{file_sha256(file)}`"),
        ("types", ", ".join(types)),
        (
            "bits per weight",
            f"{summary['bits_per_weight']:.2f}" + ("" if block is None else f", {block:.2f} in the linears of the blocks"),
        ),
    ]
    if (kurtail := summary["kurtail"]) is None:
        rows.append(("kurtail", "no keys: a stock file"))
    else:
        rows += _provenance(kurtail, summary["online"], runs_as)
    rows += [(f"activations of {name}", f"{bits} bits") for name, bits in summary["tensor_activation_bits"].items()]
    if made_by:
        rows.append(("made by", f"`{shlex.join(made_by)}`"))
    return rows


def _provenance(kurtail: Mapping[str, Any], online: Mapping[str, int], runs_as: str) -> list[tuple[str, str]]:
    folded = {"r1": "residual stream, folded", "r2": "values, folded", "r3": "queries and keys, online"}
    rotations = [
        f"{name.upper()} ({what}) {kurtail[f'{name}_kind']}" + (f" {kurtail[f'{name}_size']}" if kurtail[f"{name}_size"] else "")
        for name, what in folded.items()
    ]
    tuned = f", scales tuned for {kurtail['tune_steps']} steps" if kurtail["tune_steps"] else ""
    calibration = "none"
    if kurtail["calibration_tokens"]:
        calibration = (
            f"{kurtail['calibration_name']}, {kurtail['calibration_tokens']} tokens, sha256 of their ids "
            f"`{kurtail['calibration_sha256']}`"
        )
    return [
        ("runs as", f"{runs_as}, weights {kurtail['weights']}{tuned}"),
        ("method", f"rotation {kurtail['rotation']}, objective {kurtail['objective']}, seed {kurtail['seed']}"),
        ("rotations", "; ".join(rotations)),
        ("Hadamard of inputs, online", online_parts(online)),
        ("calibration", calibration),
        ("written by", f"{kurtail['tool']}, format {kurtail['format_version']}"),
    ]


def _figures(models: Sequence[ModelResult], reference: ModelResult | None) -> str:
    columns = {with_cache("this file", model.cache): _values(model) for model in models}
    if reference is not None:
        columns[f"reference: {reference.path}"] = _values(reference)
    rows = [(name, *(values.get(name, "") for values in columns.values())) for name in _values(models[0])]
    return _table(("measure", *columns), rows)


def _values(result: ModelResult) -> dict[str, str]:
    values = {}
    if result.perplexity is not None:
        values["perplexity"] = f"{result.perplexity:.4f} ± {result.perplexity_stderr:.4f}"
    if result.kld_mean is not None:
        values["mean KL divergence from the reference, nats"] = f"{result.kld_mean:.4f}"
    if result.top1_agreement is not None:
        values["same top token as the reference"] = f"{100 * result.top1_agreement:.2f} %"
    if result.cache_kld is not None:
        values["mean KL divergence from the same file with an f16 cache, nats"] = f"{result.cache_kld:.4f}"
        values["perplexity relative to that with an f16 cache"] = f"{result.cache_perplexity:.4f}"
    if result.mmlu is not None:
        values["MMLU, micro average"] = _percent(result.mmlu.micro)
        values["MMLU, macro average"] = _percent(result.mmlu.macro)
        values |= {f"MMLU, {name.replace('_', ' ')}": _percent(part) for name, part in result.mmlu.subjects.items()}
        if result.mmlu.shortened:
            values["MMLU, questions with fewer examples because the context is too short"] = str(result.mmlu.shortened)
    if result.tasks is not None:
        values |= {f"{metric.task}: {metric.name}, {metric.filter}": metric.text for metric in result.tasks.metrics()}
    if result.retrieval is not None:
        cells = result.retrieval.cells
        values |= {f"retrieval, {cell.length} tokens, depth {100 * cell.depth:g} %": _found(cell) for cell in cells}
    return values


def _found(cell: Cell) -> str:
    return f"{cell.right} of {cell.facts}, log-likelihood {cell.log_likelihood:.2f}"


def _percent(part: Accuracy) -> str:
    error = "" if part.stderr is None else f" ± {100 * part.stderr:.1f}"
    return f"{100 * part.accuracy:.1f}{error} % of {part.questions}"


def _activations(models: Sequence[ModelResult]) -> list[str]:
    """The bits in force: what the file is run with elsewhere may be others."""
    told = models[0].activations
    return [] if told is None else [f"Inputs of the 4-bit products were rounded to {told.bits} bits, {told.why}."]


def _conditions(request: Request, version: str) -> list[str]:
    told = []
    if (text := request.text) is not None:
        chunks = "all chunks" if text.chunks is None else f"the first {text.chunks} chunks"
        told.append(
            f"Perplexity and divergence: {text.path.name} (sha256 `{file_sha256(text.path)}`), context {text.context}, "
            f"{chunks}, the second half of each scored."
        )
    if (questions := request.mmlu) is not None:
        limit = "all questions" if questions.limit is None else f"the first {questions.limit} questions of each subject"
        told.append(
            f"MMLU: {questions.directory.name} (sha256 of its files' sha256sum lines "
            f"`{mmlu_sha256(questions.directory)}`), {limit}, {questions.shots} examples, the likeliest of the four "
            "letters; ± is the standard error."
        )
    if (tasks := request.tasks) is not None:
        shots = "the tasks' own number of examples" if tasks.shots is None else f"{tasks.shots} examples"
        limit = "all documents" if tasks.limit is None else f"the first {tasks.limit} documents of each task"
        told.append(f"Tasks of lm-eval {version} ({', '.join(tasks.names)}): {limit}, {shots}; ± is the standard error.")
    if (facts := request.retrieval) is not None:
        told.append(
            f"Retrieval: {facts.text.name} (sha256 `{file_sha256(facts.text)}`) with five-digit codes hidden in it, "
            f"{facts.needles} for each length and depth, seed {facts.seed}; how many greedy decoding found, and the mean "
            f"log-likelihood of the right code in nats, where guessing gives {GUESS:.1f}."
        )
    return told


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                # x86's and RISC-V's key, and Power's
                if key.strip() in ("model name", "uarch", "cpu") and value.strip():
                    return value.strip()
    except OSError:
        pass  # no Linux
    return platform.processor() or platform.machine()
