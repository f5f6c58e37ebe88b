"""The text that is learned from: read, or written by the model itself."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from kurtail_gguf.convert.cost import Cost, Estimate
from kurtail_gguf.convert.job import Job, Made
from kurtail_gguf.convert.own_text import (
    SCRATCH,
    cost_of_own_text,
    no_own_text,
    write_own_text,
)
from kurtail_gguf.convert.stages.stage import Stage
from kurtail_gguf.files.atomic import remove, write_atomically
from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.method.calibration.tokens import (
    CalibrationTokens,
    calibration_name,
    kept_ids,
    load_tokenizer,
    read_ids,
)
from kurtail_gguf.method.tuning.scales import STEP_TOKENS

_TOKENS, _STEPS = "tokens.npy", "tuning-steps.json"


class Calibration(Stage):
    """What is learned from: ``--calibration-tokens``, and more of the same for tuning, as far as there is more."""

    name = "calibration"
    leaves = (SCRATCH, _TOKENS, _STEPS)

    def wanted(self, job: Job) -> bool:
        return job.config.needs_calibration

    def settings(self, job: Job) -> dict[str, object]:
        config = job.config
        return {
            "calibration": list(config.calibration),
            "calibration_texts": dict(job.texts),
            "calibration_tokens": config.calibration_tokens,
            "seed": config.seed,
        }

    def refuse(self, job: Job) -> Iterator[str]:
        config, window = job.config, job.spec.window
        generated = config.calibration == ("self",)
        whole = config.learns_by_layer or config.weights == "gptq" or job.tuning_steps > 0 or config.activations == "auto"
        if window and window < job.sequence and (generated or whole):
            yield f"sliding_window {window} is below the calibration length {job.sequence}"
        if generated:
            yield from no_own_text()

    def cost(self, estimate: Estimate) -> Cost:
        job = estimate.job
        return writing(estimate, max(job.config.calibration_tokens, job.tuning_steps * STEP_TOKENS))

    def run(self, job: Job, made: Made, progress: Progress) -> None:
        self._begin(job)
        made.tokens = read(job, job.config.calibration_tokens, job.tuning_steps * STEP_TOKENS, progress)
        made.calibration = made.measured_on = made.tokens.first(job.config.calibration_tokens)

    @staticmethod
    def _begin(job: Job) -> None:
        """Note how many steps text is read for; a run that goes on with others reads it anew."""
        path = job.kept(_STEPS)
        noted = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if noted not in (None, job.tuning_steps):
            # the report is of layers with or without tuning, and of the text there is more or less
            for name in ("figures", _TOKENS):
                remove(job.kept(name))
        if noted != job.tuning_steps:
            write_atomically(path, json.dumps(job.tuning_steps))


def read(job: Job, tokens: int, tuning_tokens: int, progress: Progress) -> CalibrationTokens:
    """Text of so many tokens and, as far as there is more, of so many for tuning; kept in the work directory.

    Raises:
        CalibrationError: text that cannot be read, or is too short.
        SourceError: a model without a tokenizer.
    """
    config, checkpoint = job.config, job.checkpoint
    name, path = calibration_name(config.calibration), job.kept(_TOKENS)

    def ids() -> npt.NDArray[np.int32]:
        tokenizer = load_tokenizer(checkpoint.directory)
        if config.calibration != ("self",):
            return read_ids(config.calibration, tokenizer, job.spec.vocab_size, checkpoint.directory, tokens, tuning_tokens)
        wanted, rows = max(tokens, tuning_tokens), job.spec.vocab_size
        try:
            return write_own_text(
                checkpoint.directory, tokenizer, rows, wanted, config.seed, job.kept(SCRATCH), job.converter, progress
            )
        except KurtailError:
            # of a damaged model the runtime says no more than that its answers are no numbers
            for layer in range(job.spec.layers):
                checkpoint.layer(layer, check=True)
            raise

    found = CalibrationTokens(kept_ids(path, ids), name)
    remove(job.kept(SCRATCH))
    return found


def writing(estimate: Estimate, tokens: int) -> Cost:
    """What the model's own text of so many tokens costs; nothing where text is read."""
    spec = estimate.spec
    if estimate.job.config.calibration != ("self",):
        return Cost()
    cache = 2 * spec.layers * spec.kv_heads * spec.head_dim
    return cost_of_own_text(estimate.sizes.parameters, estimate.sizes.active, spec.vocab_size, cache, tokens, estimate.speed.single)
