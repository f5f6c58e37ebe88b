"""Worker of :mod:`kurtail_gguf.runtime.logits`: what a file's vocabulary makes of texts, and what it says to tokens.

Request: ``path``; ``texts``, perhaps none; ``sequences``, ``[[token, …], …]`` or null; ``out``,
where their log-probabilities go (.npy, float32 ``[Σ tokens, vocabulary]``); ``exact_cache``, whether keys and values are
cached in single precision instead of in ``cache``, one of runtime/cache_types.py's types; ``adapter``, a LoRA adapter's file or
null; ``activations``, one of runtime/activation_bits.py's choices or null. The result is the texts' tokens, BOS left out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kurtail_gguf.runtime import vendored


def answer(request: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> list[list[int]]:
    """Answer a request."""
    # loads the runtime, which only this process needs
    from kurtail_gguf.runtime.bindings_model import BindingsModel

    adapter = request["adapter"] and Path(request["adapter"])
    model = BindingsModel(
        Path(request["path"]), request["exact_cache"], adapter, request["cache"], activations=request["activations"]
    )
    tokens = [model.tokenize(text, special=False) for text in request["texts"]]
    if sequences := request["sequences"]:
        model.reserve(max(map(len, sequences)))
        rows = [row for sequence in sequences for row in model.log_probabilities(sequence)]
        np.save(request["out"], np.stack(rows).astype(np.float32))
    return tokens


if __name__ == "__main__":
    vendored.serve(answer)
