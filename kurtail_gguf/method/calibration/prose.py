"""A page of prose, for what must be measured where no text was given."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kurtail_gguf.method.calibration.tokens import as_contexts

PROSE = (
    "A river begins where the ground can hold no more water. Rain that fell on the hills sinks into the soil, moves "
    "slowly between the stones and comes to light again in a hundred small springs. They join, and after a few miles "
    "there is a stream that a child can jump across. Farther down it drives a mill, carries boats, and at last it is so "
    "wide that the other bank is a line in the haze. Nobody can say which of the springs was the first. People who live "
    "beside it know how high it stood in other years, and build their houses a little above that mark. Every spring it "
    "takes some earth away on one side and leaves it on the other, so that fields slowly change their owners. "
)
#: Tokens of it, at most.
TOKENS = 256
#: Contexts that each half of it is read as.
STARTS = 4


def prose_tokens(tokenizer: object, limit: int = TOKENS) -> npt.NDArray[np.int32]:
    """Its beginning behind BOS, where the model has one: int32 ``[1, length]``, at most ``limit`` tokens."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = [*bos, *tokenizer.encode(PROSE, add_special_tokens=False)][:limit]
    return np.asarray([ids], np.int32)


def prose_contexts(tokenizer: object) -> npt.NDArray[np.int32]:
    """Both halves as contexts that begin with different tokens: four that start a token later each, of the first half, then
    four of the second; int32 ``[8, length]``, with BOS where the runtime puts it. First keys of contexts are unlike all others,
    and one context does not tell whether they are alike."""
    text = as_contexts(prose_tokens(tokenizer), tokenizer)[0]
    bos = text[:1][text[:1] == tokenizer.bos_token_id]
    half = (len(text) - len(bos)) // 2
    halves = text[len(bos) :][: 2 * half].reshape(2, half)
    length = half - STARTS + 1
    return np.stack([np.append(bos, words[start : start + length]) for words in halves for start in range(STARTS)])
