"""Measures GGUF files, and the reference beside them: which measurements are asked for, in which order they run.

Everything that can be wrong with the request is found before the first of them starts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kurtail_gguf import evaluate
from kurtail_gguf.bindings import require_bindings
from kurtail_gguf.errors import ConfigError, KurtailError
from kurtail_gguf.evaluate import harness, mmlu
from kurtail_gguf.evaluate.harness import TasksRequest, TasksResult
from kurtail_gguf.evaluate.mmlu import MmluResult
from kurtail_gguf.evaluate.perplexity import check_scored
from kurtail_gguf.export import export_reference
from kurtail_gguf.gguf_info import GgufInfo, read_gguf
from kurtail_gguf.loading.source import resolve_source
from kurtail_gguf.loading.weight_files import check_weights
from kurtail_gguf.progress import Progress

_VOCABULARY = "tokenizer.ggml.tokens"

#: Keys of a result's JSON that are left out where they were not asked for.
_ONLY_IF_ASKED = ("mmlu", "tasks")


@dataclass(frozen=True, slots=True)
class TextRequest:
    """Perplexity: a UTF-8 text, tokens in a chunk, and how many chunks (all if None)."""

    path: Path
    context: int
    chunks: int | None


@dataclass(frozen=True, slots=True)
class MmluRequest:
    """MMLU: where the CSV files lie, examples before a question, questions of a subject (all if None)."""

    directory: Path
    shots: int
    limit: int | None


@dataclass(frozen=True, slots=True)
class Request:
    """What to measure; at least one of them."""

    text: TextRequest | None = None
    mmlu: MmluRequest | None = None
    tasks: TasksRequest | None = None

    def __post_init__(self) -> None:
        if self.text is None and self.mmlu is None and self.tasks is None:
            raise ConfigError("nothing to measure: give --text, --mmlu or --tasks")


@dataclass(frozen=True, slots=True)
class ModelResult:
    """One file's row; None is what was not measured or does not apply. Field names are the JSON's."""

    path: str
    perplexity: float | None
    perplexity_stderr: float | None
    kld_mean: float | None
    top1_agreement: float | None
    bits_per_weight: float
    activation_bits: int | None
    kv_bits: int
    runs_as: str
    mmlu: MmluResult | None = None
    tasks: TasksResult | None = None

    def to_json(self) -> dict[str, Any]:
        """As written by ``--json``."""
        content = asdict(self)
        return {key: value for key, value in content.items() if value is not None or key not in _ONLY_IF_ASKED}


@dataclass(frozen=True, slots=True)
class Report:
    """Results in the order of the files; the reference's own, where there is one."""

    reference: ModelResult | None
    models: tuple[ModelResult, ...]

    def to_json(self) -> dict[str, Any]:
        """As written by ``--json``."""
        own = {} if self.reference is None else {"reference": self.reference.to_json()}
        return {"models": [model.to_json() for model in self.models], **own}


def measure(
    files: tuple[Path, ...],
    request: Request,
    reference: str | None,
    progress: Progress,
    tell: Callable[[str], None] = lambda line: None,
    allow_pickle: bool = False,
) -> Report:
    """Measure files, and compare them with a reference.

    Args:
        files: GGUF files.
        request: what to measure.
        reference: an HF directory, a GGUF file or a known model; what is measured of the files is
            measured of it as well, and the divergence from it.
        progress: a stage for each measurement.
        tell: is given lines to show, of what takes much disk.
        allow_pickle: whether the reference's weights may be ``.bin`` files.

    Raises:
        KurtailError: a bad file, text, directory of questions or reference.
    """
    subjects = check(request, divergence=reference is not None)
    infos = [read_gguf(path) for path in files]
    with ExitStack() as stack:
        all_infos = list(infos)
        if reference is not None:
            all_infos.insert(0, _reference(reference, allow_pickle, stack, progress))
            _check_vocabularies(infos, all_infos[0])
        results = [_row(info) for info in all_infos]
        if request.text is not None:
            results = _perplexities(all_infos, results, request.text, reference is not None, progress, tell)
        if subjects:
            results = [
                replace(result, mmlu=mmlu.score(info.path, subjects, progress))
                for info, result in zip(all_infos, results, strict=True)
            ]
        if request.tasks is not None:
            results = [
                replace(result, tasks=harness.run_tasks(info.path, request.tasks, progress))
                for info, result in zip(all_infos, results, strict=True)
            ]
    if reference is None:
        return Report(None, tuple(results))
    # the exported file of a checkpoint is gone by now: the name that was given says more
    return Report(replace(results[0], path=reference), tuple(results[1:]))


def check(request: Request, divergence: bool) -> tuple[mmlu.Subject, ...]:
    """Refuse what cannot be measured; returns MMLU's questions.

    Args:
        request: what to measure.
        divergence: whether there will be a reference.

    Raises:
        KurtailError: no such text, no such questions, too little to score, no bindings.
    """
    if request.text is not None:
        _check_text(request.text.path)
        if divergence:
            check_scored(request.text.context, request.text.chunks)
    if request.tasks is not None:
        harness.check_tasks(request.tasks)
    if request.mmlu is None:
        return ()
    require_bindings()
    return mmlu.read_mmlu(request.mmlu.directory, request.mmlu.shots, request.mmlu.limit)


def _check_text(text: Path) -> None:
    try:
        with text.open("rb") as file:
            if not file.read(1):
                raise KurtailError(f"{text} is empty: give a text to measure on")
    except OSError as error:
        raise KurtailError(f"cannot read {text}: {error.strerror}") from None


def _perplexities(
    infos: list[GgufInfo],
    results: list[ModelResult],
    text: TextRequest,
    divergence: bool,
    progress: Progress,
    tell: Callable[[str], None],
) -> list[ModelResult]:
    """The results with perplexities; with ``divergence``, the first file is the reference of the others."""
    if not divergence:
        measured = [evaluate.perplexity(i.path, text.path, text.context, text.chunks, progress) for i in infos]
        return [
            replace(result, perplexity=one.value, perplexity_stderr=one.stderr)
            for result, one in zip(results, measured, strict=True)
        ]
    base, *others = infos
    opened = evaluate.reference(
        base.path, _vocabulary_size(base), text.path, text.context, text.chunks, progress, tell
    )
    with opened as reference:
        own = reference.perplexity
        rows = [replace(results[0], perplexity=own.value, perplexity_stderr=own.stderr)]
        for info, result in zip(others, results[1:], strict=True):
            found = evaluate.divergence(info.path, reference, text.path, text.chunks, progress)
            rows.append(
                replace(
                    result,
                    perplexity=found.perplexity.value,
                    perplexity_stderr=found.perplexity.stderr,
                    kld_mean=found.kld_mean,
                    top1_agreement=found.top1_agreement,
                )
            )
    return rows


def _reference(name: str, allow_pickle: bool, stack: ExitStack, progress: Progress) -> GgufInfo:
    """The reference as a GGUF file; a checkpoint is exported to a temporary one."""
    path = Path(name)
    if path.is_file():
        return read_gguf(path)
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kurtail-reference-")))
    source = resolve_source(name, directory, progress)
    check_weights(source, allow_pickle)
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


def _row(info: GgufInfo) -> ModelResult:
    """What a file says about itself; nothing measured yet."""
    return ModelResult(str(info.path), None, None, None, None, info.bits_per_weight, *info.runtime_bits, info.runs_as)
