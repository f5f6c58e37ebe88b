"""Text that a GGUF file writes in the runtime, many sequences at once; by the bindings, in a process of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.runtime import vendored
from kurtail_gguf.runtime.bindings import require_bindings

_WORKER = "kurtail_gguf.runtime.sampling_worker"


class Sampler:
    """A file that is loaded once and writes batches of sequences; a context that ends its process.

    Args:
        path: GGUF file.

    Raises:
        KurtailError: no bindings.
    """

    def __init__(self, path: Path) -> None:
        require_bindings()
        self._path, self._worker = path, vendored.Worker(_WORKER)

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *error: object) -> None:
        self._worker.__exit__(*error)

    def write(
        self, starts: npt.NDArray[np.int32], length: int, greedy: int, seed: Sequence[int], on_token: Callable[[], None]
    ) -> npt.NDArray[np.int32]:
        """Sequences that go on from their first tokens.

        Args:
            starts: int32 ``[sequences, n]``.
            length: tokens of a sequence, the first ones included.
            greedy: how many tokens behind the first ones are the likeliest; the rest are drawn from the model's distribution.
            seed: of the draws; the same on the same machine gives the same text.
            on_token: called when all sequences have one more token.

        Returns:
            int32 ``[sequences, length]``.

        Raises:
            KurtailError: a file that the runtime refuses, too little memory, logits that are not finite.
        """
        request = {
            "path": str(self._path.resolve()), "starts": starts.tolist(), "length": length, "greedy": greedy, "seed": list(seed),
        }  # fmt: skip
        try:
            return np.asarray(self._worker.ask(request, lambda _message: on_token()), np.int32)
        except vendored.WorkerError as error:
            raise KurtailError(f"{self._path}: {error}") from None
