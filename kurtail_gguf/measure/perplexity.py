"""Perplexity, and divergence from a reference, through the shipped runtime.

The text is cut into chunks of ``context`` tokens and the second half of each is scored, as in
llama.cpp and everything compared with it. No cache type is given unless one is asked for: a kurtail
file turns its own on, so what is measured is what a user of the file runs.

Divergence takes two runs: the reference writes its log-probabilities to a file (16 bits for each of
the vocabulary's tokens, at each scored position), and the model is compared with that.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kurtail_gguf.measure import llama_perplexity
from kurtail_gguf.measure.llama_perplexity import EvaluationError
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.runtime.activation_bits import (
    FILE_BITS,
    Activations,
    activation_arguments,
    reported_activations,
)
from kurtail_gguf.runtime.cache_types import FILE, cache_arguments, stage_name, with_cache

#: llama-perplexity prints no divergence for fewer scored tokens
_FEWEST_SCORED = 100

#: Magic, context, vocabulary, chunks.
_HEADER_BYTES = 8 + 3 * 4

#: A disk is not filled to its last byte.
_DISK_MARGIN = 64 << 20

__all__ = ["Divergence", "EvaluationError", "Perplexity", "Reference", "divergence", "perplexity", "reference"]


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp of the mean negative log-likelihood, its standard error, and the bits of activations in force (None: no kt4)."""

    value: float
    stderr: float
    activations: Activations | None = None


@dataclass(frozen=True, slots=True)
class Divergence:
    """A model beside its reference, over the scored tokens.

    Args:
        perplexity: of the model.
        kld_mean: mean of KL(reference ‖ model), in nats.
        kld_stderr: its standard error.
        top1_agreement: fraction of positions where both give the same token the highest probability.
    """

    perplexity: Perplexity
    kld_mean: float
    kld_stderr: float
    top1_agreement: float


@dataclass(frozen=True, slots=True)
class Reference:
    """Log-probabilities of a reference, on disk for as long as its context is open."""

    log_probabilities: Path
    perplexity: Perplexity
    context: int


def perplexity(
    model: Path,
    text: Path,
    context: int,
    chunks: int | None,
    progress: Progress,
    cache: str = FILE,
    activations: str | None = FILE_BITS,
) -> Perplexity:
    """Perplexity of a GGUF file on a text.

    Args:
        model: GGUF file.
        text: UTF-8 text of at least ``2 * context`` tokens.
        context: tokens in a chunk.
        chunks: how many from the start of the text; all if None.
        progress: one stage, a unit a chunk.
        cache: one of :data:`kurtail_gguf.runtime.cache_types.CACHE_TYPES`.
        activations: one of :data:`kurtail_gguf.runtime.activation_bits.ACTIVATION_CHOICES`; None is the runtime's default.

    Raises:
        EvaluationError: the runtime refuses the file, the text is too short.
    """
    output = llama_perplexity.run(
        model, _arguments(text, context, chunks, cache, activations), stage_name("perplexity", model, cache), progress
    )
    return Perplexity(*llama_perplexity.find(llama_perplexity.FINAL_ESTIMATE, output, model), reported_activations(output))


@contextlib.contextmanager
def reference(
    model: Path,
    vocabulary: int,
    text: Path,
    context: int,
    chunks: int | None,
    progress: Progress,
    cache: str = FILE,
    activations: str | None = FILE_BITS,
) -> Iterator[Reference]:
    """Run the reference and keep its log-probabilities while the context is open.

    Args:
        model: GGUF file of the reference.
        vocabulary: how many tokens it has: what the size of the file follows from.
        text, context, chunks, cache, activations: as in :func:`perplexity`.
        progress: one stage, and a line with the size of the temporary file before that is written.

    Raises:
        EvaluationError: also where the disk has no room for it.
    """
    with tempfile.TemporaryDirectory(prefix="kurtail-eval-") as directory:
        path = Path(directory) / "log-probabilities"
        size = 0

        def on_start(chunks: int) -> None:
            nonlocal size
            size = log_probabilities_bytes(vocabulary, context, chunks)
            free = shutil.disk_usage(directory).free
            if size + _DISK_MARGIN > free:
                raise EvaluationError(
                    f"the reference's log-probabilities need {size / 1e9:.1f} GB and {directory} has "
                    f"{free / 1e9:.1f} GB free: set TMPDIR to a larger disk or give fewer --chunks"
                )
            progress.tell(f"log-probabilities of the reference take {size / 1e6:.0f} MB in {directory} temporarily")

        arguments = [*_arguments(text, context, chunks, cache, activations), "--kl-divergence-base", str(path)]
        name = with_cache(model.name, None if cache == FILE else cache)
        output = llama_perplexity.run(model, arguments, f"reference {name}", progress, on_start)
        estimate = Perplexity(*llama_perplexity.find(llama_perplexity.FINAL_ESTIMATE, output, model), reported_activations(output))
        # the program does not notice that its writes fail
        if path.stat().st_size != size:
            raise EvaluationError(
                f"{path} has {path.stat().st_size} bytes, expected {size}: the disk is full; set TMPDIR to a larger one"
            )
        yield Reference(path, estimate, context)


def divergence(
    model: Path,
    reference: Reference,
    text: Path,
    chunks: int | None,
    progress: Progress,
    cache: str = FILE,
    activations: str | None = FILE_BITS,
) -> Divergence:
    """Perplexity of a GGUF file and its divergence from a reference with the same vocabulary.

    Args:
        model: GGUF file.
        reference: an open reference; text and chunks must be the ones it was run with.
        text, chunks, cache, activations: as in :func:`perplexity`.
        progress: one stage, and a line with the size of the temporary file before that is written.
    """
    arguments = [
        *_arguments(text, reference.context, chunks, cache, activations),
        *("--kl-divergence-base", str(reference.log_probabilities), "--kl-divergence"),
    ]
    output = llama_perplexity.run(model, arguments, stage_name("divergence", model, cache), progress)
    value, stderr = llama_perplexity.find(llama_perplexity.MEAN_PPL, output, model)
    kld_mean, kld_stderr = llama_perplexity.find(llama_perplexity.MEAN_KLD, output, model)
    same_top, _ = llama_perplexity.find(llama_perplexity.SAME_TOP, output, model)
    return Divergence(Perplexity(value, stderr, reported_activations(output)), kld_mean, kld_stderr, round(same_top / 100, 7))


def scored_tokens(reference: Reference) -> npt.NDArray[np.int32]:
    """The tokens that the runtime made of the text, int32 ``[chunks, context]``, without BOS put in."""
    with reference.log_probabilities.open("rb") as file:
        header = np.fromfile(file, "<i4", _HEADER_BYTES // 4)
        context, _, chunks = header[-3:].tolist()
        return np.fromfile(file, "<i4", context * chunks).reshape(chunks, context)


def scored_losses(reference: Reference) -> npt.NDArray[np.float64]:
    """Negative log-likelihood of every scored token, ``[chunks, context - 1 - context // 2]``.

    The file's precision is 16 bits, and it ends at 16 nats below the likeliest token: larger losses
    are given as what it ends at.
    """
    tokens = scored_tokens(reference)
    chunks, context = tokens.shape
    rows = np.memmap(reference.log_probabilities, "<u2", "r", offset=_HEADER_BYTES + tokens.nbytes)
    rows = rows.reshape(chunks * _scored(context), -1)
    scale, lowest = np.ascontiguousarray(rows[:, :4]).view("<f4").astype(np.float64).T
    targets = tokens[:, context // 2 + 1 :].reshape(-1)
    losses = -(scale * rows[np.arange(len(rows)), 4 + targets] + lowest)
    return losses.reshape(chunks, -1)


def check_scored(context: int, chunks: int | None) -> None:
    """Raise EvaluationError where a divergence would rest on too few scored tokens to be printed."""
    scored = _scored(context)
    if chunks is not None and scored * chunks < _FEWEST_SCORED:
        raise EvaluationError(
            f"{chunks} chunks of context {context} score {scored * chunks} tokens, but a divergence needs "
            f"{_FEWEST_SCORED}: raise --chunks or --context"
        )


def log_probabilities_bytes(vocabulary: int, context: int, chunks: int) -> int:
    """Size of llama-perplexity's file of base log-probabilities.

    A header (magic, context, vocabulary, chunks), the tokens as int32, then for each scored position
    two floats and a uint16 a token of the vocabulary, padded to an even count.
    """
    position = 2 * (2 * ((vocabulary + 1) // 2) + 4)
    return _HEADER_BYTES + 4 * context * chunks + chunks * _scored(context) * position


def _scored(context: int) -> int:
    return context - 1 - context // 2


def _arguments(text: Path, context: int, chunks: int | None, cache: str, activations: str | None) -> list[str]:
    limit = [] if chunks is None else ["--chunks", str(chunks)]
    return ["-f", str(text), "-c", str(context), *limit, *activation_arguments(activations), *cache_arguments(cache)]
