"""Worker of :mod:`kurtail_gguf.measure.mmlu`: asks the questions through the bindings.

Request: ``path``; ``cache``; ``activations``; ``subjects``, each with ``heading``, ``examples``, ``questions`` and ``where`` (texts);
``continuations``. A message with the ``activations`` in force, then one a question, in order: ``log_likelihoods`` of the continuations, ``shots``.
The result is how many tokens went through the model.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.runtime import vendored

if TYPE_CHECKING:
    from kurtail_gguf.runtime.bindings_model import BindingsModel


@dataclass(frozen=True, slots=True)
class _Asked:
    """One question as tokens; arrays, for there may be ten thousand questions of a thousand tokens."""

    context: array[int]
    continuations: list[array[int]]
    shots: int

    @property
    def length(self) -> int:
        return len(self.context) + max(map(len, self.continuations))


def ask(model: BindingsModel, request: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> int:
    """Answer a request with a loaded model."""
    asked = [
        _fit(model, subject, number, request["continuations"])
        for subject in request["subjects"]
        for number in range(len(subject["questions"]))
    ]
    # only now is the longest prompt known, and with it how much memory the cache takes
    model.reserve(max(question.length for question in asked))
    for question in asked:
        scored = model.score(question.context, question.continuations)
        send({"log_likelihoods": [one.log_likelihood for one in scored], "shots": question.shots})
    return model.computed


def _fit(model: BindingsModel, subject: dict[str, Any], number: int, continuations: list[str]) -> _Asked:
    """The question with as many of the first examples as the model's context has room for."""
    examples, question = subject["examples"], subject["questions"][number]
    for shots in range(len(examples), -1, -1):
        prompt = subject["heading"] + "".join(examples[:shots]) + question
        pairs = [model.split(prompt, continuation) for continuation in continuations]
        asked = _Asked(array("i", pairs[0][0]), [array("i", tokens) for _, tokens in pairs], shots)
        if asked.length <= model.limit:
            return asked
    raise KurtailError(
        f"{subject['where'][number]}: the question takes {asked.length} tokens without any example, but the model's "
        f"context has {model.limit}: remove the question"
    )


if __name__ == "__main__":
    # loads the runtime, which only this process needs
    from kurtail_gguf.runtime.bindings_model import load_asked

    vendored.serve(lambda request, send: ask(load_asked(request, send), request, send))
