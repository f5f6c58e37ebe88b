"""Retrieval: whether a model finds a fact again that a long text told it (:mod:`kurtail_gguf.measure.haystack`).

A fact counts as found when greedy decoding writes the right code. The log-likelihood of that code is the
finer measure: damage to the cache lowers it before the first digit is wrong.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kurtail_gguf.files.texts import read_text
from kurtail_gguf.measure.haystack import CITIES, Context, Question
from kurtail_gguf.measure.llama_perplexity import EvaluationError
from kurtail_gguf.messages.errors import ConfigError
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.runtime import vendored
from kurtail_gguf.runtime.activation_bits import FILE_BITS, Activations, told_activations
from kurtail_gguf.runtime.bindings import require_bindings
from kurtail_gguf.runtime.cache_types import FILE, stage_name
from kurtail_gguf.runtime.gguf_info import GgufInfo

DEFAULT_LENGTHS = (1024, 2048, 4096, 8192)
DEFAULT_DEPTHS = (0.1, 0.5, 0.9)
DEFAULT_NEEDLES = 4
#: Log-likelihood of a code, in nats, where each of its five digits is a guess among ten.
GUESS = -5 * math.log(10)

_BUILDER = "kurtail_gguf.measure.haystack_worker"
_WORKER = "kurtail_gguf.measure.retrieval_worker"


@dataclass(frozen=True, slots=True)
class RetrievalRequest:
    """What to ask.

    Args:
        text: UTF-8 text that hides the facts.
        lengths: tokens of the contexts, with question and answer.
        depths: places of the facts, 0 at the beginning of the text, 1 at its end.
        needles: facts for each length and depth.
        seed: of the facts.

    Raises:
        ConfigError: a value outside its range.
    """

    text: Path
    lengths: tuple[int, ...] = DEFAULT_LENGTHS
    depths: tuple[float, ...] = DEFAULT_DEPTHS
    needles: int = DEFAULT_NEEDLES
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError("--retrieval-lengths must be positive numbers of tokens")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ConfigError("--retrieval-depths must be between 0, the beginning of the text, and 1, its end")
        if len(self.depths) > len(CITIES):
            raise ConfigError(f"{len(self.depths)} values of --retrieval-depths: at most {len(CITIES)} are possible")


@dataclass(frozen=True, slots=True)
class Cell:
    """The facts of one length and depth.

    Args:
        length: tokens of the context.
        depth: of the fact in it, 0…1.
        right: how many codes greedy decoding gave.
        facts: of how many.
        log_likelihood: of the right code, mean over the facts, in nats.
    """

    length: int
    depth: float
    right: int
    facts: int
    log_likelihood: float


@dataclass(frozen=True, slots=True)
class RetrievalResult:
    """What a model found.

    Args:
        accuracy: share of the codes that greedy decoding gave, over all facts.
        log_likelihood: of the right code, mean over all facts, in nats.
        cells: by length, then by depth.
        activations: the bits in force; None where nothing was rounded.
    """

    accuracy: float
    log_likelihood: float
    cells: tuple[Cell, ...]
    activations: Activations | None = None


def check_retrieval(request: RetrievalRequest) -> str:
    """Refuse, before any work, what cannot be asked; returns the text.

    Raises:
        EvaluationError: the text cannot be read, is not UTF-8 or is empty.
        BindingsError: no bindings.
    """
    text = read_text(request.text, EvaluationError)
    if not text.strip():
        raise EvaluationError(f"{request.text} is empty: --retrieval needs a text to hide the facts in")
    require_bindings()
    return text


def check_lengths(info: GgufInfo, request: RetrievalRequest) -> None:
    """Refuse contexts that are longer than those a file's model was trained with.

    Raises:
        EvaluationError: with the limit.
    """
    limit = info.metadata.get(f"{info.architecture}.context_length")
    if limit is not None and max(request.lengths) > limit:
        raise EvaluationError(
            f"{info.path} has a context of {limit} tokens, but --retrieval-lengths asks for {max(request.lengths)}: give "
            f"lengths up to {limit}"
        )


def build(model: Path, text: str, request: RetrievalRequest) -> list[Context]:
    """The contexts as the vocabulary of a GGUF file splits them.

    Args:
        model: GGUF file; only its vocabulary is loaded.
        text: as :func:`check_retrieval` gives it.
        request: what to ask.

    Raises:
        EvaluationError: the runtime refuses the file; the text is too short for a context.
    """
    asked = {**asdict(request), "text": text, "path": str(model.resolve())}
    try:
        contexts = vendored.run(_BUILDER, asked)
    except vendored.WorkerError as error:
        raise EvaluationError(f"no retrieval test of {model} with {request.text}: {error}") from None
    return [
        Context(one["length"], one["prefix"], [Question(**question) for question in one["questions"]]) for one in contexts
    ]


def retrieve(
    model: Path,
    contexts: list[Context],
    request: RetrievalRequest,
    progress: Progress,
    cache: str = FILE,
    activations: str | None = FILE_BITS,
) -> RetrievalResult:
    """Ask a GGUF file for all facts, through the shipped runtime.

    Args:
        model: GGUF file.
        contexts: as :func:`build` gives them for the file and the request.
        request: what is asked.
        progress: one stage, a unit a token of the contexts.
        cache: one of :data:`kurtail_gguf.runtime.cache_types.CACHE_TYPES`.
        activations: one of :data:`kurtail_gguf.runtime.activation_bits.ACTIVATION_CHOICES`; None is the runtime's default.

    Raises:
        EvaluationError: the runtime refuses the file.
    """
    found: list[list[tuple[float, bool]]] = []
    in_force: Activations | None = None
    asked = {
        "path": str(model.resolve()),
        "cache": cache,
        "activations": activations,
        "contexts": [asdict(context) for context in contexts],
    }
    with progress.stage(stage_name("retrieval", model, cache), sum(context.length for context in contexts)) as stage:

        def on_message(message: dict[str, Any]) -> None:
            nonlocal in_force
            if "activations" in message:
                in_force = told_activations(message)
                return
            found.append([(log_likelihood, right) for log_likelihood, right in message["facts"]])
            right = sum(right for facts in found for _, right in facts)
            stage.advance(contexts[len(found) - 1].length, f"{right} of {sum(map(len, found))} codes right")

        try:
            vendored.run(_WORKER, asked, on_message)
        except vendored.WorkerError as error:
            raise EvaluationError(f"retrieval failed on {model}: {error}") from None
    return replace(summarise(request, found), activations=in_force)


def summarise(request: RetrievalRequest, found: list[list[tuple[float, bool]]]) -> RetrievalResult:
    """Cells and means.

    Args:
        request: what was asked.
        found: for each context in order, ``needles`` of each length, log-likelihood and whether the code was right
            for each depth.
    """
    cells = []
    for i, length in enumerate(request.lengths):
        contexts = found[i * request.needles : (i + 1) * request.needles]
        for depth, facts in zip(request.depths, zip(*contexts, strict=True), strict=True):
            cells.append(Cell(length, depth, sum(right for _, right in facts), len(facts), _mean(facts)))
    every = [fact for facts in found for fact in facts]
    return RetrievalResult(sum(right for _, right in every) / len(every), _mean(every), tuple(cells))


def _mean(facts: list[tuple[float, bool]] | tuple[tuple[float, bool], ...]) -> float:
    return math.fsum(log_likelihood for log_likelihood, _ in facts) / len(facts)
