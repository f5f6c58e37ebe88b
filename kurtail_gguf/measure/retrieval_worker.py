"""Worker of :mod:`kurtail_gguf.measure.retrieval`: asks the questions through the bindings.

Request: ``path``; ``cache``; ``activations``; ``contexts``, each with ``prefix`` and ``questions``, those with ``suffix`` and
``answer`` (token ids). A message with the ``activations`` in force, then one for each context, in order: ``facts``, for each question the log-likelihood of
the answer and whether greedy decoding gives it. The result is how many tokens went through the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kurtail_gguf.runtime import vendored

if TYPE_CHECKING:
    from kurtail_gguf.runtime.bindings_model import BindingsModel


def ask(model: BindingsModel, request: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> int:
    """Answer a request with a loaded model."""
    # once for the longest: a larger context later would begin with an empty cache
    model.reserve(
        max(
            len(context["prefix"]) + len(question["suffix"]) + len(question["answer"])
            for context in request["contexts"]
            for question in context["questions"]
        )
    )
    for context in request["contexts"]:
        found = [
            model.score([*context["prefix"], *question["suffix"]], [question["answer"]])[0]
            for question in context["questions"]
        ]
        send({"facts": [[one.log_likelihood, one.greedy] for one in found]})
    return model.computed


def _answer(request: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> int:
    # loads the runtime, which only this process needs
    from kurtail_gguf.runtime.bindings_model import load_asked

    return ask(load_asked(request, send), request, send)


if __name__ == "__main__":
    vendored.serve(_answer)
