"""Worker of :class:`kurtail_gguf.runtime.sampling.Sampler`: sequences that a file writes, all of a batch in each pass.

Request: ``path``; ``starts``, ``[[token, …], …]`` of one length; ``length`` of the sequences; ``greedy``, how many tokens are
the likeliest before the rest are drawn; ``seed``, a list of integers. A message for each token that all sequences have got; the
result is the sequences' tokens. A file stays loaded for the next request.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kurtail_gguf.runtime import vendored

#: Tokens whose probabilities are summed first when one is drawn.
_PIECE = 256


class Loaded:
    """Answers requests; keeps the file of the last one."""

    def __init__(self) -> None:
        self._path, self._model = "", None

    def __call__(self, request: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> list[list[int]]:
        """Answer a request."""
        # loads the runtime, which only this process needs
        from kurtail_gguf.runtime.bindings_model import BindingsModel

        if self._model is None or request["path"] != self._path:
            self._path, self._model = request["path"], BindingsModel(Path(request["path"]))
        starts, length = np.asarray(request["starts"], np.int32), request["length"]
        count, given = starts.shape
        drawn = np.random.default_rng(request["seed"])
        tokens = np.empty((count, length), np.int32)
        tokens[:, :given] = starts
        with self._model.together(count, length) as step:
            for position in range(length - 1):
                logits = step(tokens[:, position], position)
                if (after := position + 1) >= given:
                    greedy = after < given + request["greedy"]
                    tokens[:, after] = logits.argmax(-1) if greedy else draw(logits, drawn.random(count))
                    send({"tokens": after + 1})
        return tokens.tolist()


def draw(logits: npt.NDArray[np.float32], points: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Tokens int64 ``[sequences]`` at temperature 1 from logits ``[sequences, vocabulary]``, by inverse transform of ``points``,
    one in ``[0, 1)`` for each sequence."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    # first which piece of the vocabulary, then which token of it: running sums of all of it take ten times as long
    pieces = np.arange(0, weights.shape[-1], _PIECE)
    sums = np.add.reduceat(weights, pieces, -1, dtype=np.float64).cumsum(-1)
    tokens = np.empty(len(points), np.int64)
    for i, (row, total, point) in enumerate(zip(weights, sums, points * sums[:, -1], strict=True)):
        piece = min(int(np.searchsorted(total, point, side="right")), len(pieces) - 1)
        own = row[pieces[piece] : pieces[piece] + _PIECE].cumsum(dtype=np.float64)
        place = np.searchsorted(own, point - (total[piece - 1] if piece else 0.0), side="right")
        tokens[i] = pieces[piece] + min(int(place), len(own) - 1)
    return tokens


if __name__ == "__main__":
    vendored.serve(Loaded())
