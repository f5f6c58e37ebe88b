"""Worker of :mod:`kurtail_gguf.measure.retrieval`: builds the contexts with a file's vocabulary, without its weights.

Request: ``path``, ``text``, ``lengths``, ``depths``, ``needles``, ``seed``. The result is the contexts
(:class:`kurtail_gguf.measure.haystack.Context`) as JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kurtail_gguf.measure.haystack import build_contexts
from kurtail_gguf.runtime import vendored


def build(request: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """Answer a request."""
    # loads the runtime, which only this process needs
    from kurtail_gguf.runtime.bindings_model import BindingsModel

    model = BindingsModel(Path(request.pop("path")), vocabulary_only=True)
    return [asdict(context) for context in build_contexts(model.tokenize, **request)]


if __name__ == "__main__":
    vendored.serve(build)
