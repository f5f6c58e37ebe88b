"""A conversion as its stages see it: what is asked for, of which model, where; and what they have made so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kurtail_gguf.convert.rounding import runtime_rounding
from kurtail_gguf.convert.settings import ConvertConfig
from kurtail_gguf.method.cache.plan import CachePlan
from kurtail_gguf.method.calibration.tokens import SELF_LENGTH, SEQ_LEN, CalibrationTokens
from kurtail_gguf.method.fold.transforms import Transforms
from kurtail_gguf.method.tuning.layer_files import Kept, memory_needed
from kurtail_gguf.model.loading.checkpoint import Checkpoint
from kurtail_gguf.model.spec import ModelSpec
from kurtail_gguf.numerics.formats.targets import BLOCK_FORMATS, BlockFormat
from kurtail_gguf.numerics.simulation.runtime import RuntimeRounding
from kurtail_gguf.runtime.provenance import Provenance
from kurtail_gguf.runtime.vendored import Worker

#: A model whose tuning cannot do with so many bytes, one of more than some 14 billion weights, is tuned only where ``--tune``
#: says so. Which machine converts it decides nothing: the same command gives the same file everywhere.
DEFAULT_TUNING_BYTES = 16_000_000_000


@dataclass(frozen=True, eq=False, slots=True)
class Job:
    """What stages depend on.

    Args:
        config: what is asked for.
        checkpoint: the model.
        device: where to compute.
        work_dir: where stages keep their results; None where nothing is run.
        texts: sha256 of the calibration's files, by their names.
        converter: upstream's, running; None where nothing is run.
    """

    config: ConvertConfig
    checkpoint: Checkpoint
    device: torch.device
    work_dir: Path | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    converter: Worker | None = None

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoint.spec

    @property
    def block_format(self) -> BlockFormat:
        """What linears are stored as where they are quantized."""
        return BLOCK_FORMATS[self.config.target]

    @property
    def stored_as(self) -> BlockFormat | None:
        """The same, None where nothing is quantized."""
        return None if self.config.weights == "f32" else self.block_format

    @property
    def sequence(self) -> int:
        """Tokens in a sequence of calibration."""
        return SELF_LENGTH if self.config.calibration == ("self",) else SEQ_LEN

    @property
    def tuning_bytes(self) -> int:
        """The least that tuning can do with."""
        return memory_needed(self.checkpoint, self.block_format.block, Kept.NOTHING)

    @property
    def too_large_to_tune(self) -> bool:
        """Whether it is for its size alone that the scales are not tuned."""
        untold = self.config.tune is None and self.config.tuning_steps > 0
        return untold and self.tuning_bytes > DEFAULT_TUNING_BYTES

    @property
    def tuning_steps(self) -> int:
        """Steps of tuning: those asked for; by default none for a model too large for it."""
        if self.config.tune is not None:
            return self.config.tune
        return 0 if self.too_large_to_tune else self.config.tuning_steps

    def kept(self, name: str) -> Path:
        """Where a stage's result lies."""
        assert self.work_dir is not None
        return self.work_dir / name

    def has(self, name: str) -> bool:
        """Whether an earlier run left a stage's result."""
        return self.work_dir is not None and self.kept(name).exists()


@dataclass(eq=False, slots=True)
class Made:
    """What the stages have made so far; each sets its own and reads what those before it left.

    Args:
        rounding: what the runtime will round, as far as it is decided.
        tokens: all text that was read; None where nothing is learned from any.
        calibration: the part of it that ``--calibration-tokens`` names.
        measured_on: what the report is measured on.
        transforms: what is folded into the weights.
        cache: what was decided on the cache.
        quantized: directory of the file's tensors.
        figures: of the report.
        provenance: what the file says.
    """

    rounding: RuntimeRounding
    tokens: CalibrationTokens | None = None
    calibration: CalibrationTokens | None = None
    measured_on: CalibrationTokens | None = None
    transforms: Transforms = field(default_factory=Transforms)
    cache: CachePlan | None = None
    quantized: Path | None = None
    figures: Any = None
    provenance: Provenance | None = None

    @classmethod
    def of(cls, job: Job) -> Made:
        """Nothing yet."""
        return cls(runtime_rounding(job.config, job.spec))
