"""Worker of :mod:`kurtail_gguf.evaluate.retrieval`: builds the contexts with a file's vocabulary, without its weights.

Request: ``path``, ``text``, ``lengths``, ``depths``, ``needles``, ``seed``. The result is the contexts
(:class:`kurtail_gguf.evaluate.haystack.Context`) as JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kurtail_gguf import vendored
from kurtail_gguf.evaluate.haystack import build_contexts


def build(request: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """Answer a request."""
    # loads the runtime, which only this process needs
    from kurtail_gguf.evaluate.bindings_model import BindingsModel

    model = BindingsModel(Path(request.pop("path")), vocabulary_only=True)
    return [asdict(context) for context in build_contexts(model.tokenize, **request)]


if __name__ == "__main__":
    vendored.serve(build)
