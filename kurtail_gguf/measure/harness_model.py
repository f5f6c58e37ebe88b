"""The runtime as a model of lm-eval. Imported by the worker alone: it needs lm-eval and the bindings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.runtime.bindings_model import BindingsModel

#: What lm-eval's own models generate where a task does not say.
_MOST_GENERATED = 256
#: Names that tasks use for the most tokens to generate, first wins.
_MOST_GENERATED_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class RuntimeLM(TemplateLM):
    """lm-eval's interface over :class:`BindingsModel`.

    Prompts begin as the file's vocabulary wants it (BOS or not), and lose their beginning where they
    are longer than the model's context, as with lm-eval's own models.

    Args:
        model: the loaded file.
        send: is given ``{"kind", "requests"}`` when lm-eval asks, and ``{"done"}`` as answers come.
    """

    def __init__(self, model: BindingsModel, send: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self._model = model
        self._send = send

    @property
    def eot_token_id(self) -> int:
        return self._model.end_of_text

    @property
    def prefix_token_id(self) -> int:
        return self._model.start_of_text

    @property
    def max_length(self) -> int:
        return self._model.limit

    @property
    def max_gen_toks(self) -> int:
        return _MOST_GENERATED

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._model.tokenize(string, special=add_special_tokens is not False, parse_special=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        self._send({"kind": "log-likelihoods", "requests": len(requests)})
        answers = []
        # the choices of one question follow each other and share its context
        for context, group in groupby(requests, key=lambda request: request[1]):
            answers += self._score(context, [continuation for _, _, continuation in group])
        return answers

    def _score(self, context: list[int], continuations: list[list[int]]) -> list[tuple[float, bool]]:
        pairs = [self._cut(context, continuation) for continuation in continuations]
        answers = []
        for cut, group in groupby(pairs, key=lambda pair: pair[0]):
            scored = self._model.score(cut, [continuation for _, continuation in group])
            answers += [(one.log_likelihood, one.greedy) for one in scored]
            self._send({"done": len(scored)})
        return answers

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Both without what is too long for the model's context, from the beginning."""
        whole = [*context, *continuation][-(self.max_length + 1) :]
        scored = min(len(continuation), len(whole) - 1)
        return whole[:-scored], whole[-scored:]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        self._send({"kind": "rolling log-likelihoods", "requests": len(requests)})
        answers = []
        for request in requests:
            (text,) = request.args
            tokens = self.tok_encode(text, add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            total = 0.0
            for context, continuation in map(make_disjoint_window, windows):
                (scored,) = self._model.score(context, [continuation])
                total += scored.log_likelihood
            answers.append(total)
            self._send({"done": 1})
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        self._send({"kind": "texts", "requests": len(requests)})
        answers = []
        for request in requests:
            context, settings = request.args
            answers.append(self._generate(context, settings))
            self._send({"done": 1})
        return answers

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
            raise KurtailError("the task asks for sampled text: only greedy decoding is supported")
        given = (settings[key] for key in _MOST_GENERATED_KEYS if settings.get(key) is not None)
        most = min(int(next(given, _MOST_GENERATED)), self.max_length - 1)
        stops = settings.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        tokens = (self.tok_encode(context) or [self.prefix_token_id])[-(self.max_length - most) :]
        data = b""
        for piece in self._model.generate(tokens, most):
            data += piece
            text = data.decode("utf-8", "replace")
            ends = [text.find(stop) for stop in stops if stop and stop in text]
            if ends:
                return text[: min(ends)]
        return data.decode("utf-8", "replace")
