"""A GGUF file in the shipped runtime through the ``llama_cpp`` bindings: log-likelihoods and greedy text.

Only workers use it (:mod:`kurtail_gguf.runtime.vendored`): a runtime that aborts takes its own process with it.
No cache type is given unless asked for: a kurtail file turns its own on, as it does for whoever runs the file. Bits of
activations are the file's unless others are asked for, whatever the environment says.

The tokens of one prompt stay in the KV cache until the next one differs, so prompts that begin alike
(few-shot examples) are computed once.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.runtime.activation_bits import FILE_BITS, OVERRIDE_KEY, VARIABLE, Activations, reported_activations
from kurtail_gguf.runtime.cache_types import FILE

#: Tokens in one call of llama_decode. The runtime keeps the logits of a call: 512 rows of a vocabulary of
#: 150,000 are 300 MB already.
_BATCH = 512
#: ``GGML_TYPE_F32``.
_F32 = 0
#: ``GGML_LOG_LEVEL_ERROR``.
_LOG_ERROR = 4


@dataclass(frozen=True, slots=True)
class Scored:
    """A continuation's log-likelihood in nats, and whether greedy decoding would have written it."""

    log_likelihood: float
    greedy: bool


class BindingsModel:
    """A loaded file. Its KV cache is as large as the longest prompt so far asked for it.

    Args:
        path: GGUF file.
        exact_cache: cache keys and values in single precision and attend in it, whatever the file asks for.
        adapter: GGUF file of a LoRA adapter to apply.
        cache: one of :data:`kurtail_gguf.runtime.cache_types.CACHE_TYPES`, for keys and values alike.
        vocabulary_only: load no weights; only tokenization works then.
        activations: one of :data:`kurtail_gguf.runtime.activation_bits.ACTIVATION_CHOICES`; None leaves it to the
            runtime's default, or to the environment.
        watch: llama.h's ``cb_eval``, called for the tensors of the graph as they are computed.

    Raises:
        KurtailError: the runtime refuses the file; with what it logged.
    """

    def __init__(
        self,
        path: Path,
        exact_cache: bool = False,
        adapter: Path | None = None,
        cache: str = FILE,
        vocabulary_only: bool = False,
        activations: str | None = FILE_BITS,
        watch: Callable[[int, bool, int], bool] | None = None,
    ) -> None:
        self._watch = watch and llama_cpp.llama_cpp.ggml_backend_sched_eval_callback(watch)
        self._exact_cache = exact_cache
        self._cache = cache
        self._errors: list[str] = []
        self.activations: Activations | None = None  #: what the runtime reported; None where nothing is rounded
        # kept alive with the object: the library calls it until the process ends
        self._log = llama_cpp.llama_log_callback(self._note)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = vocabulary_only
        if activations is not None:
            params.kv_overrides = _overrides(activations)
        model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            raise KurtailError(f"the runtime cannot load {path}: {self._told()}")
        self._path = path
        self._model = model
        self._adapter = None if adapter is None else self._load_adapter(adapter)
        self._vocabulary = llama_cpp.llama_model_get_vocab(model)
        self._n_vocabulary = llama_cpp.llama_vocab_n_tokens(self._vocabulary)
        self._context: Any = None
        self._size = 0
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
        self._cached: list[int] = []
        self.computed = 0  #: tokens that went through the model so far

    @property
    def limit(self) -> int:
        """Most tokens of a prompt with its continuation: the context that the model was trained with."""
        return int(llama_cpp.llama_model_n_ctx_train(self._model))

    @property
    def end_of_text(self) -> int:
        """The token that ends a text.

        Raises:
            KurtailError: the vocabulary names none.
        """
        token = int(llama_cpp.llama_vocab_eos(self._vocabulary))
        if token < 0:
            raise KurtailError(f"the vocabulary of {self._path} has no token that ends a text")
        return token

    @property
    def start_of_text(self) -> int:
        """The token that stands before a text: BOS, or what ends one where the vocabulary has no BOS."""
        token = int(llama_cpp.llama_vocab_bos(self._vocabulary))
        return token if token >= 0 else self.end_of_text

    def tokenize(self, text: str, special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            text: what to tokenize.
            special: put in front what the vocabulary wants there (BOS).
            parse_special: read ``<|…|>`` in the text as the special tokens of these names.
        """
        data = text.encode("utf-8")
        room = len(data) + 8
        tokens = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self._vocabulary, data, len(data), tokens, room, special, parse_special)
        if count < 0:
            raise KurtailError(f"{self._path}: a text of {len(data)} bytes became more than {room} tokens")
        return list(tokens[:count])

    def split(self, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of a prompt and of what follows it; the two are tokenized as one text."""
        context = self.tokenize(prompt)
        return context, self.tokenize(prompt + continuation)[len(context) :]

    def reserve(self, tokens: int) -> None:
        """Make room for prompts of so many tokens, continuation included, within :attr:`limit`."""
        if tokens > self.limit:
            raise KurtailError(f"{self._path} has a context of {self.limit} tokens, but {tokens} were requested")
        if tokens <= self._size:
            return
        if self._context is not None:
            llama_cpp.llama_free(self._context)
            self._context, self._cached = None, []
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = tokens
        params.n_batch = min(tokens, _BATCH)
        params.n_threads = params.n_threads_batch = available_cpus()
        if self._watch is not None:
            params.cb_eval = self._watch
        if self._cache != FILE:
            params.type_k = params.type_v = getattr(llama_cpp, f"GGML_TYPE_{self._cache.upper()}")
        if self._exact_cache:
            # upstream's flash attention rounds to halves even what is cached in single precision
            params.type_k = params.type_v = _F32
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise KurtailError(f"cannot create a context of {tokens} tokens for {self._path}: {self._told()}")
        if self._adapter is not None:
            adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(self._adapter)
            llama_cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0))
        self._context = context
        self._size = int(llama_cpp.llama_n_ctx(context))
        self._step = int(llama_cpp.llama_n_batch(context))

    def score(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Scored]:
        """Log-likelihoods of continuations of one context.

        Args:
            context: token ids, at least one.
            continuations: token ids, at least one each. The last of them is only looked up, so context and
                continuation may be one token longer than :attr:`limit`.
        """
        self.reserve(len(context) + max(map(len, continuations)) - 1)
        after_context: npt.NDArray[np.float64] | None = None
        scored = []
        for continuation in continuations:
            tokens = [*context, *continuation[:-1]]
            if after_context is None:
                rows = self._log_probabilities(tokens, len(context) - 1)
                after_context = next(rows)
            else:
                rows = self._log_probabilities(tokens, len(context))
            total, greedy = 0.0, True
            for token, row in zip(continuation, chain([after_context], rows), strict=True):
                total += float(row[token])
                greedy = greedy and int(row.argmax()) == token
            scored.append(Scored(total, greedy))
        return scored

    def log_probabilities(self, tokens: Sequence[int]) -> Iterator[npt.NDArray[np.float64]]:
        """Log-probabilities ``[vocabulary]`` of what follows each token, in nats, from an empty cache."""
        self.reserve(len(tokens))
        self._forget(0)
        return self._log_probabilities(tokens, 0)

    def generate(self, context: Sequence[int], most: int) -> Iterator[bytes]:
        """Pieces of the likeliest continuation, until it ends or ``most`` tokens are out."""
        self.reserve(len(context) + most)
        tokens = list(context)
        for _ in range(most):
            (row,) = self._log_probabilities(tokens, len(tokens) - 1)
            token = int(row.argmax())
            if llama_cpp.llama_vocab_is_eog(self._vocabulary, token):
                return
            yield self._piece(token)
            tokens.append(token)

    @contextmanager
    def together(self, sequences: int, length: int) -> Iterator[Callable[[npt.NDArray[np.int32], int], npt.NDArray[np.float32]]]:
        """A context of its own for sequences that are continued all at once.

        Args:
            sequences: how many.
            length: tokens of each.

        Yields:
            ``step(tokens, position)``: logits float32 ``[sequences, vocabulary]`` after the sequences' tokens ``[sequences]`` at a
            position, valid until the next step.
        """
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = sequences * length, sequences
        params.n_batch = params.n_ubatch = max(sequences, 32)
        params.n_threads = params.n_threads_batch = available_cpus()
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise KurtailError(f"cannot create a context of {params.n_ctx} tokens for {self._path}: {self._told()}")
        batch = llama_cpp.llama_batch_init(sequences, 0, 1)
        batch.n_tokens = sequences

        def step(tokens: npt.NDArray[np.int32], position: int) -> npt.NDArray[np.float32]:
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.logits[i] = int(token), position, True
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, i
            if status := llama_cpp.llama_decode(context, batch):
                raise KurtailError(f"the runtime stopped with status {status} on {self._path}: {self._told()}")
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(sequences, self._n_vocabulary))
            if not np.isfinite(logits).all():
                raise KurtailError(f"the runtime computed NaN or infinite logits for {self._path}: the file is damaged")
            return logits

        try:
            yield step
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)

    def _log_probabilities(self, tokens: Sequence[int], first: int) -> Iterator[npt.NDArray[np.float64]]:
        """Log-probabilities ``[vocabulary]`` of what follows each of ``tokens[first:]``.

        Whatever the cache already holds of ``tokens[:first]`` is not computed again.
        """
        if first == len(tokens):
            return
        keep = self._forget(min(_common(self._cached, tokens), first))
        for start in range(keep, len(tokens), self._step):
            piece = tokens[start : start + self._step]
            for i, token in enumerate(piece):
                self._batch.token[i] = token
                self._batch.pos[i] = start + i
                self._batch.n_seq_id[i] = 1
                self._batch.seq_id[i][0] = 0
                self._batch.logits[i] = start + i >= first
            self._batch.n_tokens = len(piece)
            if status := llama_cpp.llama_decode(self._context, self._batch):
                raise KurtailError(f"the runtime stopped with status {status} on {self._path}: {self._told()}")
            self._cached.extend(piece)
            self.computed += len(piece)
            yield from (self._row(i) for i in range(len(piece)) if start + i >= first)

    def _row(self, i: int) -> npt.NDArray[np.float64]:
        pointer = llama_cpp.llama_get_logits_ith(self._context, i)
        logits = np.ctypeslib.as_array(pointer, shape=(self._n_vocabulary,)).astype(np.float64)
        if not np.isfinite(logits).all():
            raise KurtailError(f"the runtime computed NaN or infinite logits for {self._path}: the file is damaged")
        logits -= logits.max()
        return logits - np.log(np.exp(logits).sum())

    def _forget(self, keep: int) -> int:
        """Cut the cache down to its first ``keep`` tokens; returns how many are left."""
        memory = llama_cpp.llama_get_memory(self._context)
        # an architecture whose state cannot be cut starts again
        if not llama_cpp.llama_memory_seq_rm(memory, 0, keep, -1):
            llama_cpp.llama_memory_clear(memory, True)
            keep = 0
        del self._cached[keep:]
        return keep

    def _load_adapter(self, path: Path) -> Any:
        adapter = llama_cpp.llama_adapter_lora_init(self._model, os.fsencode(path))
        if not adapter:
            raise KurtailError(f"the runtime cannot apply {path}: {self._told()}")
        return adapter

    def _piece(self, token: int) -> bytes:
        room = 256
        buffer = ctypes.create_string_buffer(room)
        count = llama_cpp.llama_token_to_piece(self._vocabulary, token, buffer, room, 0, False)
        if count < 0:
            raise KurtailError(f"{self._path}: the text of token {token} is longer than {room} bytes")
        return buffer.raw[:count]

    def _note(self, level: int, text: bytes, _data: object) -> None:
        line = text.decode("utf-8", "replace").strip()
        if level == _LOG_ERROR and line:
            self._errors.append(line)
        self.activations = reported_activations(line) or self.activations

    def _told(self) -> str:
        """The first and the last error that the runtime logged."""
        if not self._errors:
            return "it gave no reason; there may be too little memory"
        return "; ".join(dict.fromkeys((self._errors[0], self._errors[-1])))


def load_asked(request: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> BindingsModel:
    """What a worker measures: the request's ``path``, ``cache`` and ``activations``; tells the bits in force."""
    os.environ.pop(VARIABLE, None)  # read by the command, which asks for what it says
    model = BindingsModel(Path(request["path"]), cache=request["cache"], activations=request["activations"])
    send({"activations": model.activations and asdict(model.activations)})
    return model


def available_cpus() -> int:
    """How many CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _overrides(activations: str) -> Any:
    """The choice as the programs hand it to the library; a key without letters ends the array."""
    overrides = (llama_cpp.llama_model_kv_override * 2)()
    overrides[0].tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR
    overrides[0].key = OVERRIDE_KEY.encode()
    overrides[0].value.val_str = activations.encode()
    return overrides


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
