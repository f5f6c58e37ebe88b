"""The stages of a conversion, in the order they run.

To add one: a file with its :class:`~kurtail_gguf.convert.stages.stage.Stage`, and its place here. Pipeline, plan and resume ask
the stages, in this order, and know no more of them.
"""

from __future__ import annotations

from kurtail_gguf.convert.stages.activations import Activations
from kurtail_gguf.convert.stages.cache import Cache
from kurtail_gguf.convert.stages.calibration import Calibration
from kurtail_gguf.convert.stages.export import Export
from kurtail_gguf.convert.stages.quantize import Quantize
from kurtail_gguf.convert.stages.report import Report
from kurtail_gguf.convert.stages.report_text import ReportText
from kurtail_gguf.convert.stages.rotations import Rotations
from kurtail_gguf.convert.stages.stage import Stage
from kurtail_gguf.convert.stages.tune import Tune

STAGES: tuple[Stage, ...] = (
    Calibration(), ReportText(), Rotations(), Cache(), Quantize(), Activations(), Tune(), Report(), Export(),
)  # fmt: skip
