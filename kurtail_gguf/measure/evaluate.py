"""Measures GGUF files, and the reference beside them: which measurements are asked for, in which order they run.

Everything that can be wrong with the request is found before the first of them starts.
"""

from __future__ import annotations

import re
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from kurtail_gguf.files.texts import check_text, without_mark
from kurtail_gguf.measure import harness, mmlu, perplexity, retrieval
from kurtail_gguf.measure.harness import TasksRequest, TasksResult
from kurtail_gguf.measure.mmlu import MmluResult
from kurtail_gguf.measure.perplexity import Reference, check_scored
from kurtail_gguf.measure.retrieval import RetrievalRequest, RetrievalResult
from kurtail_gguf.messages.errors import ConfigError, KurtailError
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.model.loading.source import resolve_source
from kurtail_gguf.model.loading.weight_files import check_weights
from kurtail_gguf.runtime.bindings import require_bindings
from kurtail_gguf.runtime.activation_bits import FILE_BITS, Activations
from kurtail_gguf.runtime.cache_types import CACHE_BITS, F16, FILE, with_cache
from kurtail_gguf.runtime.export import export_reference
from kurtail_gguf.runtime.gguf_info import GgufInfo, read_gguf

_VOCABULARY = "tokenizer.ggml.tokens"

#: Keys of a result's JSON that are left out where there is nothing to say: most were not asked for.
_ONLY_IF_ASKED = ("mmlu", "tasks", "retrieval", "cache", "cache_kld", "cache_perplexity", "activations")


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
    """What to measure, at least one measurement, and with which cache types (:mod:`kurtail_gguf.runtime.cache_types`).

    ``cache_share`` asks what each of these caches alone costs on the text. ``activations`` is one of
    :data:`kurtail_gguf.runtime.activation_bits.ACTIVATION_CHOICES`, None for the runtime's default.
    """

    text: TextRequest | None = None
    mmlu: MmluRequest | None = None
    tasks: TasksRequest | None = None
    retrieval: RetrievalRequest | None = None
    caches: tuple[str, ...] = (FILE,)
    cache_share: bool = False
    activations: str | None = None

    def __post_init__(self) -> None:
        if self.cache_share and self.text is None:
            raise ConfigError("--cache-share compares a file's predictions with two caches: give --text FILE")
        if not any((self.text, self.mmlu, self.tasks, self.retrieval)):
            raise ConfigError("nothing to measure: give --text, --mmlu, --tasks or --retrieval")


@dataclass(frozen=True, slots=True)
class ModelResult:
    """One file's row; None is what was not measured or does not apply. Field names are the JSON's.

    ``cache`` is the type that was asked for; None where the file's own was not chosen by name. ``cache_kld`` is the mean
    divergence from the same file with an f16 cache, in nats, ``cache_perplexity`` the perplexity divided by that one's.
    ``activations`` is what the runtime reported, None where nothing is rounded; ``activation_bits`` and ``runs_as`` agree
    with it.
    """

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
    retrieval: RetrievalResult | None = None
    cache: str | None = None
    cache_kld: float | None = None
    cache_perplexity: float | None = None
    activations: Activations | None = None

    @property
    def name(self) -> str:
        """The path, with the cache type where one was asked for: unique among the rows of a report."""
        return with_cache(self.path, self.cache)

    def to_json(self) -> dict[str, Any]:
        """As written by ``--json``."""
        content = asdict(self)
        return {key: value for key, value in content.items() if value is not None or key not in _ONLY_IF_ASKED}


@dataclass(frozen=True, slots=True)
class _Subject:
    """A file, and the cache type and bits of activations it is measured with; the reference's own by default."""

    info: GgufInfo
    cache: str = FILE
    activations: str | None = FILE_BITS

    @property
    def run_as(self) -> tuple[str, str | None]:
        """Cache type and bits of activations, the last arguments of every measurement."""
        return self.cache, self.activations

    @property
    def has_f16_cache(self) -> bool:
        """Whether that is an f16 cache, of keys and values in all layers."""
        return self.cache == F16 or (self.cache == FILE and self.info.runtime_bits[1] == CACHE_BITS[F16])


@dataclass(frozen=True, slots=True)
class Report:
    """Results in the order of the files, for each in the order of the cache types; the reference's own, where there is one."""

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
    allow_pickle: bool = False,
) -> Report:
    """Measure files, and compare them with a reference.

    Args:
        files: GGUF files.
        request: what to measure.
        reference: an HF directory, a GGUF file or a known model; what is measured of the files is
            measured of it as well, with its own cache and bits of activations, and the divergence from it.
        progress: a stage for each measurement.
        allow_pickle: whether the reference's weights may be ``.bin`` files.

    Raises:
        KurtailError: a bad file, text, directory of questions or reference.
    """
    questions, haystack = check(request, divergence=reference is not None or request.cache_share)
    infos = [read_gguf(path) for path in files]
    _check_lengths(infos, request)
    with ExitStack() as stack:
        if request.text is not None:
            request = replace(request, text=replace(request.text, path=stack.enter_context(without_mark(request.text.path))))
        subjects = [_Subject(info, cache, request.activations) for info in infos for cache in request.caches]
        results = [_row(subject, request.caches) for subject in subjects]
        if reference is not None:
            base = _reference(reference, allow_pickle, stack, progress)
            _check_vocabularies(infos, base)
            _check_lengths([base], request)
            subjects.insert(0, _Subject(base))
            results.insert(0, _row(subjects[0]))
        if request.retrieval is not None:
            # all of them before anything is measured: the text may be too short for one of the vocabularies
            paths = dict.fromkeys(subject.info.path for subject in subjects)
            contexts = {path: retrieval.build(path, haystack, request.retrieval) for path in paths}
        if request.text is not None and (reference is not None or not request.cache_share):
            results = _perplexities(subjects, results, request.text, reference is not None, progress)
        if request.cache_share:
            own = slice(0 if reference is None else 1, None)
            results[own] = _cache_shares(subjects[own], results[own], request.text, progress)
        if questions:
            results = [
                replace(result, mmlu=mmlu.score(subject.info.path, questions, progress, *subject.run_as))
                for subject, result in zip(subjects, results, strict=True)
            ]
        if request.tasks is not None:
            results = [
                replace(result, tasks=harness.run_tasks(subject.info.path, request.tasks, progress, *subject.run_as))
                for subject, result in zip(subjects, results, strict=True)
            ]
        if request.retrieval is not None:
            results = [
                replace(
                    result,
                    retrieval=retrieval.retrieve(
                        subject.info.path, contexts[subject.info.path], request.retrieval, progress, *subject.run_as
                    ),
                )
                for subject, result in zip(subjects, results, strict=True)
            ]
    results = [_in_force(result) for result in results]
    if reference is None:
        return Report(None, tuple(results))
    # the exported file of a checkpoint is gone by now: the name that was given says more
    return Report(replace(results[0], path=reference), tuple(results[1:]))


def check(request: Request, divergence: bool) -> tuple[tuple[mmlu.Subject, ...], str]:
    """Refuse what cannot be measured; returns MMLU's questions and the text of the retrieval test.

    Args:
        request: what to measure.
        divergence: whether a divergence will be measured.

    Raises:
        KurtailError: no such text, no such questions, too little to score, no bindings.
    """
    if request.text is not None:
        check_text(request.text.path, KurtailError)
        if divergence:
            check_scored(request.text.context, request.text.chunks)
    if request.tasks is not None:
        harness.check_tasks(request.tasks)
    haystack = "" if request.retrieval is None else retrieval.check_retrieval(request.retrieval)
    if request.mmlu is None:
        return (), haystack
    require_bindings()
    return mmlu.read_mmlu(request.mmlu.directory, request.mmlu.shots, request.mmlu.limit), haystack


def _perplexities(
    subjects: list[_Subject],
    results: list[ModelResult],
    text: TextRequest,
    divergence: bool,
    progress: Progress,
) -> list[ModelResult]:
    """The results with perplexities; with ``divergence``, the first file is the reference of the others."""
    if not divergence:
        measured = [
            perplexity.perplexity(one.info.path, text.path, text.context, text.chunks, progress, *one.run_as)
            for one in subjects
        ]
        return [
            replace(result, perplexity=one.value, perplexity_stderr=one.stderr, activations=one.activations)
            for result, one in zip(results, measured, strict=True)
        ]
    base, *others = subjects
    opened = perplexity.reference(
        base.info.path, _vocabulary_size(base.info), text.path, text.context, text.chunks, progress
    )
    with opened as reference:
        own = reference.perplexity
        rows = [
            replace(results[0], perplexity=own.value, perplexity_stderr=own.stderr, activations=own.activations)
        ]
        for subject, result in zip(others, results[1:], strict=True):
            found = perplexity.divergence(subject.info.path, reference, text.path, text.chunks, progress, *subject.run_as)
            rows.append(
                replace(
                    result,
                    perplexity=found.perplexity.value,
                    perplexity_stderr=found.perplexity.stderr,
                    kld_mean=found.kld_mean,
                    top1_agreement=found.top1_agreement,
                    activations=found.perplexity.activations,
                )
            )
    return rows


def _cache_shares(
    subjects: list[_Subject],
    results: list[ModelResult],
    text: TextRequest,
    progress: Progress,
) -> list[ModelResult]:
    """The results with what each cache alone costs, and with perplexities where they have none yet.

    A file is its own reference, run once with an f16 cache for all of its cache types.
    """
    rows = []
    for path, pairs in groupby(zip(subjects, results, strict=True), key=lambda pair: pair[0].info.path):
        group = list(pairs)
        first = group[0][0]
        opened = perplexity.reference(
            path, _vocabulary_size(first.info), text.path, text.context, text.chunks, progress, F16, first.activations
        )
        with opened as base:
            rows += [_cache_share(subject, result, base, text, progress) for subject, result in group]
    return rows


def _cache_share(
    subject: _Subject, result: ModelResult, base: Reference, text: TextRequest, progress: Progress
) -> ModelResult:
    kld, measured = 0.0, base.perplexity
    if not subject.has_f16_cache:
        found = perplexity.divergence(subject.info.path, base, text.path, text.chunks, progress, *subject.run_as)
        kld, measured = found.kld_mean, found.perplexity
    if result.perplexity is None:
        result = replace(
            result, perplexity=measured.value, perplexity_stderr=measured.stderr, activations=measured.activations
        )
    return replace(result, cache_kld=kld, cache_perplexity=measured.value / base.perplexity.value)


def _reference(name: str, allow_pickle: bool, stack: ExitStack, progress: Progress) -> GgufInfo:
    """The reference as a GGUF file; a checkpoint is exported to a temporary one."""
    path = Path(name)
    if path.is_file():
        return read_gguf(path)
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kurtail-reference-")))
    source = resolve_source(name, directory, progress, allow_pickle)
    check_weights(source, allow_pickle)
    exported = directory / "reference.gguf"
    with progress.stage(f"export {name}", 1) as stage:
        export_reference(source, exported)
        stage.advance()
    return read_gguf(exported)


def _check_lengths(infos: list[GgufInfo], request: Request) -> None:
    if request.retrieval is not None:
        for info in infos:
            retrieval.check_lengths(info, request.retrieval)


def _check_vocabularies(infos: list[GgufInfo], reference: GgufInfo) -> None:
    # llama-perplexity goes on with a reference of another vocabulary, and compares garbage
    for info in infos:
        if info.metadata.get(_VOCABULARY) != reference.metadata.get(_VOCABULARY):
            raise KurtailError(
                f"{info.path} and the reference have different vocabularies, so their predictions cannot be compared: give "
                "the reference of this file"
            )


def _vocabulary_size(info: GgufInfo) -> int:
    tokens = info.metadata.get(_VOCABULARY)
    if tokens is None:
        raise KurtailError(f"{info.path} has no vocabulary: give a complete model as reference")
    return int(tokens["length"]) if isinstance(tokens, dict) else len(tokens)


def _in_force(result: ModelResult) -> ModelResult:
    """The result with the bits of activations that the runtime reported, where it did."""
    measured = (result.mmlu, result.tasks, result.retrieval)
    found = [result.activations, *(one.activations for one in measured if one is not None)]
    activations = next(filter(None, found), None)
    if activations is None:
        return result
    runs_as = activations.applied(result.runs_as)
    return replace(result, activations=activations, activation_bits=activations.general, runs_as=runs_as)


def _row(subject: _Subject, caches: tuple[str, ...] = (FILE,)) -> ModelResult:
    """What a file says about itself, and the cache where one was asked for; nothing measured yet."""
    info, cache = subject.info, subject.cache
    row = ModelResult(str(info.path), None, None, None, None, info.bits_per_weight, *info.runtime_bits, info.runs_as)
    if caches == (FILE,):
        return row
    if cache == FILE:
        return replace(row, cache=cache)
    bits = CACHE_BITS[cache]
    # W4A4KV4 and the like; a stock file's words say nothing about its cache
    return replace(row, cache=cache, kv_bits=bits, runs_as=re.sub(r"^(W\d+A[\d+]+)K.*", rf"\1KV{bits}", row.runs_as))
