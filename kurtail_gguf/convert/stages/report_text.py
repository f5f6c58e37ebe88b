"""A few tokens for the report, where nothing else reads any."""

from __future__ import annotations

from collections.abc import Iterator

from kurtail_gguf.convert.cost import Cost, Estimate
from kurtail_gguf.convert.job import Job, Made
from kurtail_gguf.convert.own_text import no_own_text
from kurtail_gguf.convert.stages.calibration import read, writing
from kurtail_gguf.convert.stages.stage import Stage
from kurtail_gguf.measure.figures import MEASURED_TOKENS
from kurtail_gguf.messages.progress import Progress


class ReportText(Stage):
    """``figures`` are measured on it. A kind of :class:`Calibration` for conversions without one."""

    name = "text for the report"

    def wanted(self, job: Job) -> bool:
        return job.config.report is not None and not job.config.needs_calibration

    def refuse(self, job: Job) -> Iterator[str]:
        return no_own_text() if job.config.calibration == ("self",) else iter(())

    def cost(self, estimate: Estimate) -> Cost:
        return writing(estimate, MEASURED_TOKENS)

    def run(self, job: Job, made: Made, progress: Progress) -> None:
        made.measured_on = read(job, MEASURED_TOKENS, 0, progress)
