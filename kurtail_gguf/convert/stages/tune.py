"""Block scales tuned end to end."""

from __future__ import annotations

from collections.abc import Iterator

from kurtail_gguf.convert.cost import CONVERTED, Cost, Estimate
from kurtail_gguf.convert.job import Job, Made
from kurtail_gguf.convert.settings import DEFAULT_TUNE
from kurtail_gguf.convert.stages.stage import Stage
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.method.tuning.layer_files import memory_shortage, tune
from kurtail_gguf.method.tuning.scales import STEP_TOKENS

_TUNED = "tuned"


class Tune(Stage):
    """The steps that are asked for, or that the model gets by default (:attr:`Job.tuning_steps`)."""

    name = "tune"
    leaves = (_TUNED, "tuning")

    def wanted(self, job: Job) -> bool:
        return job.tuning_steps > 0

    def settings(self, job: Job) -> dict[str, object]:
        # what is asked for, not what the model gets: text and layers before it are the same, and the stage of calibration
        # notices where a run goes on with other steps
        return {"tune": job.config.tuning_steps}

    def refuse(self, job: Job) -> Iterator[str]:
        if not job.has(_TUNED) and (shortage := memory_shortage(job.checkpoint, job.block_format.block, job.device)):
            asked = "tuning of scales" if job.config.tune is None else f"--tune {job.config.tune}"
            yield f"{asked} {shortage}: give --tune 0 or use a larger machine"

    def notes(self, job: Job) -> Iterator[str]:
        if job.too_large_to_tune:
            yield (
                f"scales are not tuned: a model of this size needs about {job.tuning_bytes / 1e9:.1f} GB for it; give "
                f"--tune {DEFAULT_TUNE} to tune them"
            )

    def cost(self, estimate: Estimate) -> Cost:
        job, spec, sizes = estimate.job, estimate.spec, estimate.sizes
        steps = job.tuning_steps
        memory = estimate.moment("tune scales", cpu=estimate.student, host=8 * sizes.table + 5 * sizes.layer, card=estimate.student)
        disk = {
            "tuned layers": estimate.quantized + 12 * estimate.every // job.block_format.block,
            "the unquantized model's answers": 4 * max(job.config.calibration_tokens, steps * STEP_TOKENS) * spec.hidden_size,
        }
        # forward twice, backward, and the unquantized model once
        seconds = 2 * (8 + 2) * steps * STEP_TOKENS * sizes.active / estimate.speed.tuning
        # codes that become weights anew each time
        seconds += 3 * 8 * steps * (sizes.parameters - sizes.active) / CONVERTED
        return memory | Cost(disk=disk, seconds={"tune scales": seconds})

    def run(self, job: Job, made: Made, progress: Progress) -> None:
        assert made.tokens is not None and made.quantized is not None
        made.quantized = tune(
            job.checkpoint, made.tokens.ids, made.quantized, job.block_format, made.rounding, job.tuning_steps,
            job.kept(_TUNED), job.device, progress,
        )  # fmt: skip
