"""What a stage of a conversion is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from kurtail_gguf.convert.cost import Cost, Estimate
from kurtail_gguf.convert.job import Job, Made
from kurtail_gguf.messages.progress import Progress


class Stage:
    """A step of a conversion, with everything that is known of it: what it does, costs, depends on and cannot do.

    ``name`` is what its seconds are told under. ``leaves`` are its files and directories in the work directory, what others
    of them rest on last: removing the first few leaves a directory that a run can go on from. Each is there whole or not at
    all, and taken over where it is there.
    """

    name: ClassVar[str]
    leaves: ClassVar[tuple[str, ...]] = ()

    def wanted(self, job: Job) -> bool:
        """Whether the job has this stage at all."""
        return True

    def settings(self, job: Job) -> dict[str, object]:
        """What its result depends on beside the model, as JSON values: results of other settings are not taken over.

        A setting is named by the first stage that depends on it.
        """
        return {}

    def refuse(self, job: Job) -> Iterator[str]:
        """Why it cannot be done, each a line with its remedy, before any work; asked where it is wanted."""
        return iter(())

    def notes(self, job: Job) -> Iterator[str]:
        """What a user should know before any work; asked whether it is wanted or not."""
        return iter(())

    def cost(self, estimate: Estimate) -> Cost:
        """Memory, disk and seconds, from the job's sizes alone; asked where it is wanted and not refused."""
        raise NotImplementedError

    def run(self, job: Job, made: Made, progress: Progress) -> None:
        """Do it, or take over what an earlier run did, and note the result in ``made``."""
        raise NotImplementedError
