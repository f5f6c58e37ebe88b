"""What ``--report`` shows of every layer, measured when the file's tensors are final."""

from __future__ import annotations

from kurtail_gguf.convert.cost import Cost, Estimate
from kurtail_gguf.convert.job import Job, Made
from kurtail_gguf.convert.stages.rotations import capturing
from kurtail_gguf.convert.stages.stage import Stage
from kurtail_gguf.measure.figures import MEASURED_TOKENS, measure_figures
from kurtail_gguf.messages.progress import Progress


class Report(Stage):
    """Nothing in the file depends on it, and so it has no settings."""

    name = "measure for the report"
    leaves = ("figures",)

    def wanted(self, job: Job) -> bool:
        return job.config.report is not None

    def cost(self, estimate: Estimate) -> Cost:
        # every layer is folded once more, and the text goes through all of them
        seconds = 4 * MEASURED_TOKENS * estimate.every / estimate.speed.single
        return capturing(estimate) | Cost(seconds={self.name: seconds})

    def run(self, job: Job, made: Made, progress: Progress) -> None:
        assert made.measured_on is not None and made.quantized is not None
        made.figures = measure_figures(
            job.checkpoint, made.measured_on, made.transforms, made.rounding, job.stored_as, made.quantized, job.work_dir,
            job.config.seed, job.device, progress,
        )  # fmt: skip
