"""Token batches: what the model is run on, with the name and hash that go into the file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kurtail_gguf.files.atomic import replacing
from kurtail_gguf.messages.errors import CalibrationError, SourceError
from kurtail_gguf.method.calibration.texts import chat_template, read_texts
from kurtail_gguf.runtime.export import no_tokenizer

#: Tokens in a sequence cut from texts, and in one that the model writes itself.
SEQ_LEN, SELF_LENGTH = 512, 256


@dataclass(frozen=True, eq=False)
class CalibrationTokens:
    """``ids`` int32 ``[sequences, seq_len]``, and ``name`` as ``kurtail.calibration.name`` has it."""

    ids: npt.NDArray[np.int32]
    name: str

    @property
    def sha256(self) -> str:
        """Hex digest of the ids as little-endian int32 (``kurtail.calibration.sha256``)."""
        return hashlib.sha256(np.ascontiguousarray(self.ids, "<i4").tobytes()).hexdigest()

    def first(self, n_tokens: int) -> CalibrationTokens:
        """The sequences that hold the first ``n_tokens``."""
        return CalibrationTokens(self.ids[: -(-n_tokens // self.ids.shape[1])], self.name)


def calibration_name(sources: tuple[str, ...]) -> str:
    """``self``, ``hf:NAME``, or names of files and directories without their directories, joined by commas."""
    return ",".join(source if source.startswith("hf:") else Path(source).absolute().name for source in sources)


def load_tokenizer(directory: Path) -> object:
    """The checkpoint's tokenizer.

    Raises:
        SourceError: the directory holds none that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # anything transformers makes of missing or damaged tokenizer files
        # where there is no file of one, transformers asks for packages that are installed
        told = no_tokenizer(directory) or f"{directory}: transformers cannot read its tokenizer: {error}"
        raise SourceError(told) from error


def cut_sequences(
    documents: Iterable[npt.NDArray[np.int32]],
    n_tokens: int,
    bos: int | None,
    seq_len: int = SEQ_LEN,
    at_most: int = 0,
) -> npt.NDArray[np.int32]:
    """Join tokenized documents and cut them into sequences that each start with BOS.

    Args:
        documents: token ids, int32 ``[n]`` each; only as many are taken as needed.
        n_tokens: tokens needed, rounded up to whole sequences.
        bos: id put first in every sequence; None where the model has none.
        seq_len: tokens in a sequence.
        at_most: tokens of use, rounded up likewise: so many where there are so many, if that is more than is needed.

    Returns:
        int32 ``[sequences, seq_len]``.

    Raises:
        CalibrationError: the texts are too short; the message has both counts.
    """
    body = seq_len - (bos is not None)
    needed = -(-n_tokens // seq_len)
    useful = max(needed, -(-at_most // seq_len))
    pieces: list[npt.NDArray[np.int32]] = []
    count = 0
    for document in documents:
        pieces.append(document)
        count += len(document)
        if count >= useful * body:
            break
    if count < needed * body:
        raise CalibrationError(
            f"the calibration text has {count} tokens, but {needed * body} are needed: give more text or lower "
            "--calibration-tokens"
        )
    sequences = min(useful, count // body)
    ids = np.concatenate(pieces)[: sequences * body].reshape(sequences, body)
    if bos is not None:
        ids = np.concatenate([np.full((sequences, 1), bos, np.int32), ids], axis=1)
    return np.ascontiguousarray(ids, np.int32)


def tokenize(texts: Iterable[str], tokenizer: object, n_tokens: int, at_most: int = 0) -> npt.NDArray[np.int32]:
    """Sequences of :data:`SEQ_LEN` tokens from texts; see :func:`cut_sequences`."""
    # A long text is tokenized in pieces, so that a book is not tokenized for its first page.
    def documents() -> Iterable[npt.NDArray[np.int32]]:
        for text in texts:
            for start in range(0, len(text), 1 << 16):
                piece = text[start : start + (1 << 16)]
                # not verbose: a piece longer than the model's context is no mistake to warn of
                yield np.asarray(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"], np.int32)

    return cut_sequences(documents(), n_tokens, tokenizer.bos_token_id, at_most=at_most)


def as_contexts(ids: npt.NDArray[np.int32], tokenizer: object) -> npt.NDArray[np.int32]:
    """Sequences that begin as the runtime's contexts do: without BOS where the tokenizer does not put it before a text.

    Attention looks at a context's first key most, and BOS may have another than text: Qwen2.5's has.

    Args:
        ids: behind BOS, where the model has one, as :func:`tokenize` gives them: int32 ``[sequences, seq_len]``.
        tokenizer: the checkpoint's.
    """
    bos = tokenizer.bos_token_id
    return ids if bos is None or tokenizer("a")["input_ids"][:1] == [bos] else ids[:, 1:]


def read_ids(
    sources: Sequence[str], tokenizer: object, vocabulary: int, directory: Path, n_tokens: int, at_most: int = 0
) -> npt.NDArray[np.int32]:
    """Sequences from files of text, for a model of ``vocabulary`` tokens; see :func:`cut_sequences`.

    Raises:
        CalibrationError: text that cannot be read or is too short, or a token that the model of ``directory`` does not have.
    """
    ids = tokenize(read_texts(sources, chat_template(tokenizer)), tokenizer, n_tokens, at_most)
    if ids.max() >= vocabulary:
        raise CalibrationError(
            f"{directory}: the tokenizer's id {ids.max()} is outside the model's vocabulary of {vocabulary}: download the "
            "tokenizer's files again"
        )
    return ids


def kept_ids(path: Path, make: Callable[[], npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
    """What an earlier run left at ``path`` (.npy), or what is made and left there now, whole or not at all."""
    if path.exists():
        return np.load(path)
    ids = make()
    with replacing(path) as scratch, scratch.open("wb") as file:
        np.save(file, ids)
    return ids
