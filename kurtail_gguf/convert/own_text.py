"""Calibration text that the model writes itself, so that nothing needs downloading.

As LLM-QAT generates its data (Liu et al. 2023, arXiv:2305.17888, section 3.1): from a random first token, the next few
tokens greedily, the rest sampled from the model's distribution. The runtime writes it, many sequences at once, from a file of
the model in upstream's 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kurtail_gguf.convert.cost import PROGRAM_BYTES, Cost
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.method.calibration.tokens import SELF_LENGTH, kept_ids
from kurtail_gguf.runtime.bindings import BindingsError, require_bindings
from kurtail_gguf.runtime.export import export_reference
from kurtail_gguf.runtime.sampling import Sampler
from kurtail_gguf.runtime.vendored import Worker

#: Name of the directory of the 8-bit file and of the batches that are done, in the work directory.
SCRATCH = "own-text"
#: Greedy tokens after the random one: they settle on a language and a topic.
GREEDY_TOKENS = 3
#: Most sequences written together; their KV cache is what bounds it.
BATCH = 128
#: Weights a second that are written in 8 bits.
_WRITTEN = 1e8
#: How many times as fast as torch's products in single precision the runtime's are at 8 bits, for so many tokens at once.
_QUICKER = 2.0


def write_own_text(
    source: Path, tokenizer: Any, rows: int, n_tokens: int, seed: int, scratch: Path, converter: Worker | None, progress: Progress
) -> npt.NDArray[np.int32]:
    """Sample token sequences from a model.

    Args:
        source: HF directory.
        tokenizer: its own.
        rows: of the embedding: ids from there on are unknown to the model.
        n_tokens: tokens wanted, rounded up to whole sequences.
        seed: of the first tokens and of the sampling.
        scratch: a directory for the 8-bit file and the batches that are done; a run that was interrupted goes on from them.
            The caller removes it when the text is kept.
        converter: upstream's, running; None starts one.
        progress: one stage, a unit for each token of a batch's sequences.

    Returns:
        int32 ``[ceil(n_tokens / SELF_LENGTH), SELF_LENGTH]``, each behind BOS where the model has one.

    Raises:
        KurtailError: no bindings, a full disk, a model that the runtime refuses.
    """
    scratch.mkdir(exist_ok=True)
    file = scratch / "model.gguf"
    if not file.exists():
        with progress.stage("write the model in 8 bits", 1) as stage:
            export_reference(source, file, "q8_0", converter)
            stage.advance()
    starts = _starts(tokenizer, rows, -(-n_tokens // SELF_LENGTH), seed)
    batches = [starts[first : first + BATCH] for first in range(0, len(starts), BATCH)]
    with progress.stage("generate text", len(batches) * (SELF_LENGTH - starts.shape[1])) as stage, Sampler(file) as sampler:
        parts = []
        for number, batch in enumerate(batches):
            path = scratch / f"{number:04}.npy"
            if path.exists():
                stage.advance(SELF_LENGTH - starts.shape[1])
            parts.append(
                kept_ids(path, lambda: sampler.write(batch, SELF_LENGTH, GREEDY_TOKENS, [seed, number], stage.advance))  # noqa: B023
            )
    return np.concatenate(parts)


def _starts(tokenizer: Any, rows: int, sequences: int, seed: int) -> npt.NDArray[np.int32]:
    """What sequences begin with: BOS, where there is one, and a token that is not special; int32 ``[sequences, 1 or 2]``."""
    special = frozenset(tokenizer.all_special_ids)
    allowed = np.array([one for one in range(min(rows, len(tokenizer))) if one not in special], np.int32)
    first = np.random.default_rng(seed).choice(allowed, sequences)[:, None]
    if tokenizer.bos_token_id is None:
        return first
    return np.concatenate([np.full_like(first, tokenizer.bos_token_id), first], 1)


def no_own_text() -> Iterator[str]:
    """Why a model cannot write here, a line."""
    try:
        require_bindings()
    except BindingsError as error:
        yield f"text that the model writes itself needs them: {error}; or give --calibration a text"


def cost_of_own_text(parameters: int, active: int, vocabulary: int, cache_values: int, n_tokens: int, speed: float) -> Cost:
    """What writing so much costs.

    Args:
        parameters: of the model.
        active: what of them a token is multiplied by.
        vocabulary: rows of the head.
        cache_values: what a token has in the cache, in half precision.
        n_tokens: tokens that are written.
        speed: operations a second of a product in single precision.
    """
    sequences = min(BATCH, -(-n_tokens // SELF_LENGTH))
    model = 34 * parameters // 32
    memory = model + 2 * cache_values * sequences * SELF_LENGTH + 24 * sequences * vocabulary
    return Cost(
        memory={"generate text": PROGRAM_BYTES + memory},
        disk={"the model in 8 bits, for its own text": model},
        seconds={"generate text": parameters / _WRITTEN + 2 * n_tokens * active / (_QUICKER * speed)},
    )
