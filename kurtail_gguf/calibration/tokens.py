"""Token batches: what the model is run on, with the name and hash that go into the file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kurtail_gguf.errors import CalibrationError, SourceError

#: Tokens in a sequence cut from texts.
SEQ_LEN = 512


@dataclass(frozen=True, eq=False)
class CalibrationTokens:
    """``ids`` int32 ``[sequences, seq_len]``, and ``name`` as ``kurtail.calibration.name`` has it."""

    ids: npt.NDArray[np.int32]
    name: str

    @property
    def sha256(self) -> str:
        """Hex digest of the ids as little-endian int32 (``kurtail.calibration.sha256``)."""
        return hashlib.sha256(np.ascontiguousarray(self.ids, "<i4").tobytes()).hexdigest()


def calibration_name(sources: tuple[str, ...]) -> str:
    """``self``, ``hf:NAME``, or file names without their directories, joined by commas."""
    return ",".join(source if source.startswith("hf:") else Path(source).name for source in sources)


def load_tokenizer(directory: Path) -> object:
    """The checkpoint's tokenizer.

    Raises:
        SourceError: the directory holds none that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # anything transformers makes of missing or damaged tokenizer files
        raise SourceError(f"{directory}: no tokenizer that transformers can read: {error}") from error


def cut_sequences(
    documents: Iterable[npt.NDArray[np.int32]],
    n_tokens: int,
    bos: int | None,
    seq_len: int = SEQ_LEN,
) -> npt.NDArray[np.int32]:
    """Join tokenized documents and cut them into sequences that each start with BOS.

    Args:
        documents: token ids, int32 ``[n]`` each; only as many are taken as needed.
        n_tokens: tokens wanted, rounded up to whole sequences.
        bos: id put first in every sequence; None where the model has none.
        seq_len: tokens in a sequence.

    Returns:
        int32 ``[ceil(n_tokens / seq_len), seq_len]``.

    Raises:
        CalibrationError: the texts are too short; the message has both counts.
    """
    body = seq_len - (bos is not None)
    sequences = -(-n_tokens // seq_len)
    pieces: list[npt.NDArray[np.int32]] = []
    count = 0
    for document in documents:
        pieces.append(document)
        count += len(document)
        if count >= sequences * body:
            break
    if count < sequences * body:
        raise CalibrationError(
            f"the calibration text has {count} tokens, {sequences * body} are needed: give more text or "
            "lower --calibration-tokens"
        )
    ids = np.concatenate(pieces)[: sequences * body].reshape(sequences, body)
    if bos is not None:
        ids = np.concatenate([np.full((sequences, 1), bos, np.int32), ids], axis=1)
    return np.ascontiguousarray(ids, np.int32)


def tokenize(texts: Iterable[str], tokenizer: object, n_tokens: int) -> npt.NDArray[np.int32]:
    """Sequences of :data:`SEQ_LEN` tokens from texts; see :func:`cut_sequences`."""
    # A long text is tokenized in pieces, so that a book is not tokenized for its first page.
    def documents() -> Iterable[npt.NDArray[np.int32]]:
        for text in texts:
            for start in range(0, len(text), 1 << 16):
                piece = text[start : start + (1 << 16)]
                yield np.asarray(tokenizer(piece, add_special_tokens=False)["input_ids"], np.int32)

    return cut_sequences(documents(), n_tokens, tokenizer.bos_token_id)
