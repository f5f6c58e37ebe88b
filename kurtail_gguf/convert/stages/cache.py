"""The KV cache: how keys are prepared, bits of each layer, and what the cache costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from kurtail_gguf.convert.cost import CONVERTED, ROWS, Cost, Estimate
from kurtail_gguf.convert.job import Job, Made
from kurtail_gguf.convert.stages.stage import Stage
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.method.cache.plan import SEQUENCES, plan_cache
from kurtail_gguf.method.cache.streams import LOGIT_TOKENS
from kurtail_gguf.method.calibration.prose import STARTS, prose_contexts
from kurtail_gguf.method.calibration.prose import TOKENS as PROSE_TOKENS
from kurtail_gguf.method.calibration.tokens import as_contexts, load_tokenizer
from kurtail_gguf.numerics.simulation.rounding import CACHE_BLOCK


class Cache(Stage):
    """What ``--kv`` asks for, decided and measured on calibration's text, else on a page of prose."""

    name = "cache"
    leaves = ("cache.json", "cache.safetensors", "measuring-cache")

    def settings(self, job: Job) -> dict[str, object]:
        return {"kv": job.config.cache_bits, "kv_budget": job.config.cache_budget or None}

    def refuse(self, job: Job) -> Iterator[str]:
        kv, size = job.config.cache_bits, job.spec.head_dim
        if kv != 16 and size % CACHE_BLOCK:
            yield (
                f"--kv {kv} is not supported for {job.spec.family.architecture} with head_dim {size}: 4- and 8-bit caches "
                f"have blocks of {CACHE_BLOCK} values, which must divide it; give --kv 16"
            )

    def cost(self, estimate: Estimate) -> Cost:
        spec, sizes, name = estimate.spec, estimate.sizes, "choose the cache's bits"
        if estimate.job.config.cache_bits == 16:
            return Cost()
        sequences, length = _text_size(estimate)
        loaded = 4 * sizes.layer + 4 * sizes.widest if estimate.on_card else estimate.loading
        where = loaded + _computing(estimate, sequences, length) + estimate.rotations(1 if estimate.on_card else spec.layers)[1]
        # inputs of layers on their way to the file, the head in pieces
        passing = 4 * 2 * sequences * length * spec.hidden_size + 6 * ROWS * spec.hidden_size
        memory = estimate.moment(name, cpu=where, host=estimate.ahead + estimate.all_rotations + passing, card=where)
        # two models on two texts, and forward and back through one of them; a head for each, and back once
        passes, heads = (4, 4) if estimate.job.config.cache_bits == 8 else (6, 7)
        text = sequences * length
        seconds = 2 * text * (passes * estimate.every + heads * sizes.table) / estimate.speed.single
        # the head is read and made single precision for so many tokens at a time
        seconds += -(-text // LOGIT_TOKENS) * heads * sizes.table * 6 / CONVERTED
        inputs = {"inputs of layers, while the cache is measured": 4 * spec.layers * text * spec.hidden_size}
        return memory | Cost(disk=inputs, seconds={name: seconds})

    def run(self, job: Job, made: Made, progress: Progress) -> None:
        config = job.config
        made.cache = plan_cache(
            job.checkpoint, _text(job, made), config.cache_bits, config.cache_budget, made.transforms.r2, made.rounding.cache,
            job.work_dir, job.device, progress,
        )  # fmt: skip
        made.transforms = replace(made.transforms, key_scales=made.cache.scales, key_offsets=made.cache.offsets)
        made.rounding = replace(made.rounding, cache=replace(made.rounding.cache, layers=made.cache.layers()))


def _text(job: Job, made: Made) -> npt.NDArray[np.int32]:
    """Tokens that the cache is decided on: calibration's, else prose; none, and no tokenizer, where nothing is decided."""
    if job.config.cache_bits == 16:
        return np.empty((0, 0), np.int32)
    tokenizer = load_tokenizer(job.checkpoint.directory)
    return prose_contexts(tokenizer) if made.calibration is None else as_contexts(made.calibration.ids, tokenizer)


def _text_size(estimate: Estimate) -> tuple[int, int]:
    """Sequences that the cache is decided on and tokens of one; as many others it is measured on."""
    config = estimate.job.config
    if not config.needs_calibration:
        sequences, length = STARTS, PROSE_TOKENS // 2 - STARTS + 1
    else:
        length = estimate.job.sequence
        sequences = min(SEQUENCES, -(-config.calibration_tokens // length) // 2)
    return sequences, min(length, estimate.spec.window or length)


def _computing(estimate: Estimate, sequences: int, length: int) -> int:
    """What deciding takes where it is computed, beside the layer as it was read."""
    spec, sizes = estimate.spec, estimate.sizes
    hidden, heads = spec.hidden_size, spec.heads * spec.head_dim
    # two residual streams of either text, what becomes of one, gradients
    streams = 4 * 8 * sequences * length * hidden
    # in double precision, and a linear of it changed, before it is single again
    folding = 12 * sizes.attention + 16 * heads * hidden
    # with what the backward pass wants, and scores should they be kept
    each = 12 * hidden + 16 * heads + 6 * spec.intermediate_size * max(1, spec.experts_used)
    running = 4 * sizes.attention + 4 * length * (each + 2 * spec.heads * length)
    if spec.experts:
        # stacked anew for each pass: gate and up once more while they become one
        running += 16 * (sizes.layer - sizes.attention) // 3
    # of teacher and student, what they are on the way, and a gradient; the head in pieces
    logits = 4 * 5 * LOGIT_TOKENS * spec.vocab_size + 6 * min(ROWS, spec.vocab_size) * hidden
    return streams + max(folding, running, logits)
