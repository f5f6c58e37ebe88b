"""From MODEL to a GGUF: one stage after the other, and how a run ends that cannot go on.

Every stage leaves its result in the work directory, complete or not at all, and is skipped where the
result is already there; the layers of the last stage count one by one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from kurtail_gguf.convert.by_itself.conversion import convert_by_itself
from kurtail_gguf.convert.by_itself.loading import by_itself
from kurtail_gguf.convert.header import check_header
from kurtail_gguf.convert.job import Job, Made
from kurtail_gguf.convert.settings import ConvertConfig, ConvertResult
from kurtail_gguf.convert.stages import STAGES
from kurtail_gguf.convert.workdir import discard, locked, open_work_dir
from kurtail_gguf.files.destinations import check_out
from kurtail_gguf.machine.device import pick_device
from kurtail_gguf.machine.memory import (
    CardMemory,
    card_peak,
    current_card,
    memory_available,
    memory_held,
    memory_total,
    start_card_peak,
)
from kurtail_gguf.machine.resources import peak_memory
from kurtail_gguf.measure.outliers import check_matplotlib
from kurtail_gguf.messages.errors import CalibrationError, KurtailError, QuantizeError, SourceError
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.method.calibration.texts import check_texts, texts_sha256
from kurtail_gguf.model.loading.checkpoint import Checkpoint, open_checkpoint
from kurtail_gguf.model.loading.source import resolve_source
from kurtail_gguf.runtime.export import start_converter
from kurtail_gguf.runtime.provenance import TOOL
from kurtail_gguf.runtime.vendored import Worker


def convert(config: ConvertConfig, progress: Progress) -> ConvertResult:
    """Convert a model to a 4-bit GGUF with rotations.

    Args:
        config: what to do.
        progress: told about every stage.

    Returns:
        The file written, its provenance, and seconds by stage.

    Raises:
        KurtailError: anything that is wrong with model, text, options or OUT. OUT is then untouched.
    """
    check_out(config.out)
    if config.keep_rotations is not None:
        check_out(config.keep_rotations, "--keep-rotations")
    if config.report is not None:
        check_out(config.report, "--report")
        check_matplotlib("--report")
    device = pick_device(config.device)
    texts = _text_hashes(config)
    work_dir = config.work_dir or config.out.with_name(config.out.name + ".work")
    disposable = config.work_dir is None and not work_dir.exists()
    with locked(work_dir), start_converter() as converter:
        if config.restart:
            discard(work_dir, source=True)
        clock = _Clock(device)
        try:
            with current_card(device):
                result = _convert(config, texts, work_dir, device, clock, converter, progress)
        except torch.cuda.OutOfMemoryError as error:
            raise _card_full(device, clock.running, work_dir) from error
        except (SourceError, CalibrationError, QuantizeError) as error:
            if isinstance(error.__cause__, OSError) and any((work_dir / "quantized").glob("layer-*")):
                raise _read_error(error, work_dir) from error
            # Bad input: nothing that was computed from it is worth keeping.
            if disposable:
                discard(work_dir, source=True)
            raise
        except (OSError, SafetensorError) as error:
            raise _disk_error(error, work_dir) from error
        if config.work_dir is None:
            discard(work_dir, source=True)
    return result


def _disk_error(error: OSError | SafetensorError, work_dir: Path) -> KurtailError:
    """A full disk, most often. What is finished is kept."""
    reason = getattr(error, "strerror", None) or str(error)
    name = getattr(error, "filename", None)
    return KurtailError(
        f"{reason}{f': {name}' if name else ''}: finished steps are kept in {work_dir}; free some space (or grant access) "
        "and rerun the same command"
    )


def _read_error(error: KurtailError, work_dir: Path) -> KurtailError:
    """A disk or network that failed, which is not the input's fault. What is finished is kept."""
    return SourceError(
        f"{error}; finished steps are kept in {work_dir}: once the file is readable again, rerun the same command"
    )


def _card_full(device: torch.device, stage: str, work_dir: Path) -> KurtailError:
    """A GPU without enough memory. What is finished is kept."""
    total, held = memory_total(device), memory_held(device)
    others = total - held - memory_available(device)
    return KurtailError(
        f"{device} ran out of memory in the stage {stage!r}: of its {total / 1e9:.1f} GB this run held {held / 1e9:.1f}, "
        f"others {others / 1e9:.1f}: stop what else uses it and rerun the same command (finished steps are kept in "
        f"{work_dir}), or give --device cpu --restart; --plan reports what is needed"
    )


def _convert(
    config: ConvertConfig,
    texts: dict[str, str],
    work_dir: Path,
    device: torch.device,
    clock: _Clock,
    converter: Worker,
    progress: Progress,
) -> ConvertResult:
    with clock.measure("source"):
        source = resolve_source(config.model, work_dir, progress, config.allow_pickle)
        checkpoint = None if by_itself(source) else _checked(source, config, converter, progress)
    if checkpoint is None:
        provenance, layers, weights, resumed = convert_by_itself(config, texts, source, work_dir, device, clock.measure, converter, progress)
        return ConvertResult(
            config.out, provenance, clock.seconds, layers, weights, resumed, clock.peak_bytes, None, str(device), clock.card_peak
        )
    job = Job(config, checkpoint, device, work_dir, texts, converter)
    for stage in STAGES:
        if stage.wanted(job) and (reason := next(stage.refuse(job), None)):
            raise KurtailError(reason)
    resumed = open_work_dir(work_dir, settings(job))
    for note in (note for stage in STAGES for note in stage.notes(job)):
        progress.tell(note)
    made = Made.of(job)
    for stage in STAGES:
        if stage.wanted(job):
            with clock.measure(stage.name):
                stage.run(job, made, progress)
    assert made.cache is not None and made.provenance is not None
    each = (job.spec.at(layer).linear_shapes() for layer in range(job.spec.layers))
    weights = sum(math.prod(shape) for shapes in each for shape in shapes.values())
    return ConvertResult(
        config.out, made.provenance, clock.seconds, job.spec.layers, weights, resumed, clock.peak_bytes, made.figures,
        str(device), clock.card_peak, made.cache.warning,
    )  # fmt: skip


def _checked(source: Path, config: ConvertConfig, converter: Worker, progress: Progress) -> Checkpoint:
    checkpoint = open_checkpoint(source, config.allow_pickle)
    checkpoint.check_filled()
    check_header(checkpoint, progress, converter)  # what the file cannot say is told now, not after an hour
    return checkpoint


def settings(job: Job) -> dict[str, object]:
    """What the results of all stages depend on, whether the job has them or not, as JSON values."""
    found = {"tool": TOOL, "checkpoint": job.checkpoint.fingerprint(), "device": job.device.type}
    for stage in STAGES:
        found |= stage.settings(job)
    return found


class _Clock:
    """Seconds and memory of each stage; ``running`` is the one that began last."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.running = ""
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        self.card_peak: dict[str, CardMemory] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        self.running = name
        start_card_peak(self._device)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.peak_bytes[name] = peak_memory()
        if (peak := card_peak(self._device)) is not None:
            self.card_peak[name] = peak


def _text_hashes(config: ConvertConfig) -> dict[str, str]:
    """Hashes of the text files: missing ones, and what is no text, are noticed at once, edited ones on a rerun."""
    if not config.needs_calibration:
        return {}
    hashes = {name: texts_sha256(name) for name in config.calibration_files}
    check_texts(config.calibration_files)
    return hashes
