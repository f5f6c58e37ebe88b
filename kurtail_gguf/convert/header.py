"""Is what the file will say of the model what the checkpoint means? Asked before any work, of upstream's converter itself.

The runtime computes by the file's keys and by constants of its graphs, transformers by config.json. What the two make of a
model is compared: sizes, vocabulary, and how RoPE turns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kurtail_gguf.messages.errors import SourceError, UnsupportedArchitecture
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.method.calibration.tokens import load_tokenizer
from kurtail_gguf.model.loading.checkpoint import Checkpoint
from kurtail_gguf.model.rope_turns import checkpoint_turns, runtime_turns
from kurtail_gguf.runtime.export import Header, read_header
from kurtail_gguf.runtime.gguf_info import UNPACKED_KEYS, read_gguf
from kurtail_gguf.runtime.vendored import Worker

#: Tokens of a window that is of use: calibration reads sequences of so many, and the runtime's contexts are no shorter.
SHORTEST_WINDOW = 512
#: Largest relative difference of two numbers that are the same, one of them in single precision.
_SAME = 1e-5
#: ``gguf.PoolingType.RANK``: the file is of a model that ranks documents.
_RANKS = 4
#: Tokens outside the embedding that are named.
_NAMED = 3


def check_header(checkpoint: Checkpoint, progress: Progress, converter: Worker) -> None:
    """Refuse a model that upstream's converter describes as another one, and tell what it leaves out.

    Raises:
        UnsupportedArchitecture: what the runtime would compute is something else than the checkpoint means.
        SourceError: a vocabulary that the embedding has no rows for.
        ExportError: a tokenizer or configuration that upstream's converter does not know.
    """
    spec, where = checkpoint.spec, checkpoint.directory / "config.json"
    if spec.window and spec.window < SHORTEST_WINDOW:
        raise UnsupportedArchitecture(
            f"{where}: sliding_window {spec.window} is not supported: the runtime computes full attention for this "
            f"architecture, which is the same only within the window, and a context below {SHORTEST_WINDOW} tokens is too "
            "short"
        )
    header = read_header(checkpoint.directory, spec.window, converter)
    for note in (*checkpoint.notes, *header.dropped, *_notes(checkpoint)):
        progress.tell(f"warning: {note}")
    told = _Told(header.metadata)
    for key, found, expected in _sizes(checkpoint, told):
        if not math.isclose(found, expected, rel_tol=_SAME):
            raise UnsupportedArchitecture(
                f"{where} cannot be converted: upstream's converter reads {key} as {found:g}, transformers as "
                f"{expected:g}: remove the key of config.json that they interpret differently"
            )
    if told("attention.causal", True) is False:
        raise UnsupportedArchitecture(f"{where}: is_causal false is not supported: only models that generate text are")
    if told("pooling_type", 0) == _RANKS:
        raise UnsupportedArchitecture(
            f"{checkpoint.directory} cannot be converted: upstream's converter treats it as a reranker because of the "
            "directory's name or its README.md, and only models that generate text are supported: rename the directory"
        )
    _check_unpacked(checkpoint, told)
    _check_vocabulary(checkpoint, header, progress)
    _check_turns(checkpoint, header, told)


class _Told:
    """Hyper-parameters by the part of their keys behind the architecture."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata, self._prefix = metadata, f"{metadata['general.architecture']}."

    def __call__(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(self._prefix + key, default)


def _notes(checkpoint: Checkpoint) -> Iterator[str]:
    spec, where = checkpoint.spec, checkpoint.directory / "config.json"
    if spec.window:
        yield (
            f"{where}: the runtime ignores sliding_window {spec.window} and computes full attention, so the file's context "
            f"is limited to {spec.window} tokens, within which both are the same; a larger context (-c) gives other "
            "results than the model"
        )
    parameters = getattr(checkpoint.config, "rope_parameters", None) or getattr(checkpoint.config, "rope_scaling", None) or {}
    kind = parameters.get("rope_type", parameters.get("type"))
    limit = parameters.get("original_max_position_embeddings") or getattr(checkpoint.config, "original_max_position_embeddings", 0)
    if kind in ("longrope", "su") and limit and limit < checkpoint.config.max_position_embeddings:
        yield (
            f"{where}: the runtime uses the long set of longrope in every context above {limit} tokens, transformers only "
            f"for texts longer than that: run the file with -c {limit} where that is enough"
        )


def _sizes(checkpoint: Checkpoint, told: _Told) -> Iterator[tuple[str, float, float]]:
    """Name, what the file will say, what the checkpoint means; those that the file says nothing of are left out."""
    spec, config = checkpoint.spec, checkpoint.config
    width = "expert_feed_forward_length" if told("expert_feed_forward_length") is not None else "feed_forward_length"
    head_dim = told("attention.key_length", told("embedding_length") // told("attention.head_count"))
    yield "head_dim", head_dim, spec.head_dim
    expected = {
        "block_count": spec.layers, "embedding_length": spec.hidden_size, width: spec.intermediate_size,
        "attention.head_count": spec.heads, "attention.head_count_kv": spec.kv_heads,
        "attention.value_length": spec.head_dim, "attention.layer_norm_rms_epsilon": spec.eps,
        "attention.layer_norm_epsilon": spec.eps, "expert_count": spec.experts, "expert_used_count": spec.experts_used,
        "expert_shared_feed_forward_length": spec.shared_width, "leading_dense_block_count": len(spec.dense_layers),
        "expert_group_count": 1, "expert_weights_norm": spec.normalized, "expert_weights_scale": spec.share_factor,
        "context_length": spec.window or config.max_position_embeddings,
    }  # fmt: skip
    if spec.dense is not None:
        expected["feed_forward_length"] = spec.dense.intermediate_size
    for key, value in expected.items():
        found = told(key)
        for one in found if isinstance(found, list) else [] if found is None else [found]:
            yield key, one, value


def _check_unpacked(checkpoint: Checkpoint, told: _Told) -> None:
    """Refuse a GGUF as MODEL that says of the model what its config.json, made by us, no longer does."""
    keys = checkpoint.directory / UNPACKED_KEYS
    if not keys.exists():
        return
    metadata = read_gguf(keys).metadata
    prefix = f"{metadata['general.architecture']}."
    for key, value in metadata.items():
        name = key.removeprefix(prefix)
        found = told(name) if key.startswith(prefix) else None
        if found is None or (name == "context_length" and checkpoint.spec.window):
            continue
        before, after = ([one] if not isinstance(one, list) else one for one in (value, found))
        longest = max(len(before), len(after))
        before, after = (one * longest if len(one) == 1 else one for one in (before, after))
        if not _alike_values(before, after):
            raise UnsupportedArchitecture(
                f"{checkpoint.directory}: key {key} of the GGUF file is {value}, but upstream's converter writes {found} for the model "
                "that was read from it: convert from the Hugging Face checkpoint instead"
            )


def _alike_values(before: Sequence[Any], after: Sequence[Any]) -> bool:
    numbers = all(isinstance(one, int | float) for one in (*before, *after))
    return _alike(before, after) if numbers else list(before) == list(after)


def _check_vocabulary(checkpoint: Checkpoint, header: Header, progress: Progress) -> None:
    """Refuse tokens that the embedding has no row for: upstream's converter cuts some vocabularies without a word."""
    rows, found = checkpoint.spec.vocab_size, header.metadata["tokenizer.ggml.tokens"]
    count = found["length"] if isinstance(found, dict) else len(found)
    if count != rows:
        raise SourceError(
            f"{checkpoint.directory}: the vocabulary has {count} tokens, but the embedding has {rows} rows (vocab_size): "
            "they belong to different models; download the tokenizer's files again"
        )
    if (checkpoint.directory / UNPACKED_KEYS).exists():
        return  # the vocabulary is as it was in the file
    tokenizer = load_tokenizer(checkpoint.directory)
    added = tokenizer.get_added_vocab()
    outside = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    if not outside:
        return
    named = ", ".join(f"{token!r} {number}" for token, number in sorted(outside.items(), key=lambda item: item[1])[:_NAMED])
    told = (
        f"{checkpoint.directory}: {len(outside)} tokens of the tokenizer ({named}{', …' if len(outside) > _NAMED else ''}) "
        f"are outside the embedding of {rows} rows (vocab_size)"
    )
    if not outside.keys() <= added.keys():
        raise SourceError(f"{told}: they belong to different models; download the tokenizer's files, or the model's, again")
    progress.tell(f"warning: {told}: they are left out of the file")


def _check_turns(checkpoint: Checkpoint, header: Header, told: _Told) -> None:
    spec, where = checkpoint.spec, checkpoint.directory / "config.json"
    if header.factors and not spec.family.rope_factors:
        raise UnsupportedArchitecture(
            f"{where}: this rope_parameters (rope_scaling) is not supported: upstream's graph reads no frequency factors "
            f"for {spec.family.architecture}"
        )
    for name, (expected, size) in checkpoint_turns(checkpoint.config).items():
        frequencies, magnitude = runtime_turns(told, header.factors, name, spec.family.yarn_keys)
        if not math.isclose(magnitude, size, rel_tol=_SAME):
            raise UnsupportedArchitecture(
                f"{where}: this rope_parameters (rope_scaling) is not supported: transformers multiplies queries and keys "
                f"by {size:.4g}, the runtime by {magnitude:.4g}, because it does not read these values of "
                "attention_factor, mscale or mscale_all_dim; leave them out if the model was trained without them"
            )
        if not _alike(frequencies, expected):
            raise UnsupportedArchitecture(
                f"{where}: this rope_parameters (rope_scaling) is not supported: transformers turns {2 * len(expected)} "
                f"values of a head by other frequencies than the runtime, which turns {2 * len(frequencies)}, because of a "
                "key that only transformers reads (beta_fast, truncate, partial_rotary_factor, another rope_type)"
            )


def _alike(found: Sequence[float], expected: Sequence[float]) -> bool:
    return len(found) == len(expected) and all(math.isclose(*pair, rel_tol=_SAME) for pair in zip(found, expected, strict=True))
