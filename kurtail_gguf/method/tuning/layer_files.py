"""The stage after quantization: block scales tuned end to end, layer files in and out."""

from __future__ import annotations

import math
import os
import shutil
from enum import IntEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file

from kurtail_gguf.files.atomic import filling, publish
from kurtail_gguf.machine.memory import memory_available
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.method.fold.tables import EmbeddingRows, read_ending, read_head
from kurtail_gguf.method.tuning.scales import STEP_TOKENS, Outside, tune_scales
from kurtail_gguf.method.tuning.student import QuantizedLayer, Rounded, Student
from kurtail_gguf.method.tuning.teacher import Teacher, run_teacher
from kurtail_gguf.model.ending import Ending
from kurtail_gguf.model.loading.checkpoint import Checkpoint
from kurtail_gguf.model.precision import tuning_dtype
from kurtail_gguf.model.spec import ModelSpec
from kurtail_gguf.numerics.formats.targets import BlockFormat
from kurtail_gguf.numerics.simulation.runtime import RuntimeRounding


class Kept(IntEnum):
    """What stays in memory of all layers, beside their scales: each step keeps what the ones before it do."""

    NOTHING = 0  #: codes are read from their files whenever their layer runs
    CODES = 1  #: a byte a weight
    ALL = 2  #: weights in single precision and activations: nothing is computed twice


def memory_needed(checkpoint: Checkpoint, block: int, kept: Kept) -> int:
    """Bytes that the :class:`Student` and the learning of its scales take at their peak."""
    spec = checkpoint.spec
    layer = sum(math.prod(shape) for shape in spec.layer_shapes().values())
    # experts that tokens are routed to are weights one at a time, the others of a layer are codes meanwhile
    routed = 3 * spec.experts * spec.hidden_size * spec.intermediate_size
    weights = layer - routed + (routed // spec.experts if spec.experts else 0)
    each = {
        Kept.NOTHING: 0,
        Kept.CODES: layer,
        # about twelve activations of each kind of width
        Kept.ALL: layer + 4 * (layer - routed) + 48 * STEP_TOKENS * (spec.hidden_size + spec.intermediate_size * max(1, spec.experts_used)),
    }[kept]
    # scale, gradient and Adam's two averages; residual streams; head twice; logits of both, and gradients; one layer
    return (
        spec.layers * each
        + 16 * spec.layers * layer // block
        + 4 * STEP_TOKENS * spec.hidden_size * spec.layers
        + 8 * spec.vocab_size * spec.hidden_size
        + 16 * STEP_TOKENS * spec.vocab_size
        + 13 * weights + routed
    )


def what_fits(checkpoint: Checkpoint, block: int, device: torch.device) -> Kept:
    """As much as the memory has room for; half of it at most where codes alone would do."""
    available = memory_available(device)
    if memory_needed(checkpoint, block, Kept.ALL) <= available // 2:
        return Kept.ALL
    return Kept.CODES if memory_needed(checkpoint, block, Kept.CODES) <= available else Kept.NOTHING


def memory_shortage(checkpoint: Checkpoint, block: int, device: torch.device) -> str | None:
    """For a message: how the least that is possible exceeds what the device has; None where that fits."""
    needed, available = memory_needed(checkpoint, block, Kept.NOTHING), memory_available(device)
    if needed <= available:
        return None
    return f"needs about {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free on {device}"


def tune(
    checkpoint: Checkpoint,
    ids: npt.NDArray[np.int32],
    quantized: Path,
    block_format: BlockFormat,
    rounding: RuntimeRounding,
    steps: int,
    target: Path,
    device: torch.device,
    progress: Progress,
) -> Path:
    """Tune the scales of quantized layers.

    Args:
        checkpoint: the model they were made from.
        ids: calibration tokens, int32 ``[sequences, length]``.
        quantized: directory that ``layerwise.fold_and_quantize`` filled.
        block_format: what its linears are stored as.
        rounding: what the runtime rounds.
        steps: of learning.
        target: directory to make, of the same layout; what is there already is taken over.
        device: where to compute.
        progress: two stages, the unquantized model's run and the learning.

    Returns:
        ``target``.

    Raises:
        KurtailError: a divergence that is not finite.
    """
    scratch = target.with_name("tuning")
    if target.exists():
        shutil.rmtree(scratch, ignore_errors=True)
        return target
    scratch.mkdir(exist_ok=True)
    teacher = open_teacher(checkpoint, ids, scratch / "teacher.npy", device, progress)
    student, outside = open_student(
        checkpoint, quantized, block_format, rounding, device, ids.shape[1], products=tuning_dtype(device)
    )
    scales = tune_scales(student, teacher, outside, ids, steps, scratch / "state.safetensors", device, progress)
    with filling(target) as directory:
        for path in quantized.iterdir():
            if not path.name.startswith("layer-"):
                _link(path, directory / path.name)
        files = _layer_files(quantized, checkpoint.spec)
        for (prefix, path), layer, tuned in zip(files, student.layers, scales, strict=True):
            save_file(_packed(layer, tuned, prefix, block_format), directory / path.name)
    shutil.rmtree(scratch)
    return target


def open_teacher(
    checkpoint: Checkpoint, ids: npt.NDArray[np.int32], path: Path, device: torch.device, progress: Progress
) -> Teacher:
    """What the unquantized model says to ``ids``; its run is kept in ``path`` (.npy) and taken over from there."""
    if not path.exists():
        partial = path.with_name(f"{path.stem}.partial.npy")
        run_teacher(checkpoint, ids, partial, device, progress)
        publish(partial, path)
    return Teacher(checkpoint, np.load(path, mmap_mode="r"), device)


def open_student(
    checkpoint: Checkpoint,
    quantized: Path,
    block_format: BlockFormat,
    rounding: RuntimeRounding,
    device: torch.device,
    length: int,
    **options: Rounded | torch.dtype,
) -> tuple[Student, Outside]:
    """The quantized model of a directory, for sequences of ``length``; ``options`` are :class:`Student`'s."""
    kept = what_fits(checkpoint, block_format.block, device)
    files = _layer_files(quantized, checkpoint.spec)
    layers = [read_layer(path, prefix, block_format, device, kept > Kept.NOTHING) for prefix, path in files]
    student = Student(checkpoint, layers, rounding, device, length, recompute=kept < Kept.ALL, **options)
    spec = checkpoint.spec
    head = torch.from_numpy(read_head(quantized)).to(device)
    return student, Outside(EmbeddingRows(quantized, spec), head, Ending(spec, read_ending(quantized), device))


def _layer_files(quantized: Path, spec: ModelSpec) -> list[tuple[str, Path]]:
    """Each layer's prefix and file."""
    prefixes = map(spec.layer_prefix, range(spec.layers))
    return list(zip(prefixes, sorted(quantized.glob("layer-*.safetensors")), strict=True))


def read_layer(
    path: Path, prefix: str, block_format: BlockFormat, device: torch.device, keep_codes: bool = True
) -> QuantizedLayer:
    """One layer's file; ``prefix`` is what its names begin with. Its codes are kept, or read again when asked for."""
    codes, scales, rest = {}, {}, {}
    for full, value in load_file(path).items():
        name = full.removeprefix(prefix)
        if value.dtype != np.uint8:
            rest[name] = torch.from_numpy(value).to(device)
            continue
        linear = name.removesuffix(".weight")
        own_codes, own_scales = block_format.unpack(value)
        if keep_codes:
            codes[linear] = torch.from_numpy(own_codes).to(device)
        scales[linear] = torch.from_numpy(own_scales.astype(np.float32)).to(device)
    if keep_codes:
        return QuantizedLayer(lambda: codes, scales, rest)
    return QuantizedLayer(lambda: read_layer(path, prefix, block_format, device).codes(), scales, rest)


def _packed(
    layer: QuantizedLayer, scales: dict[str, torch.Tensor], prefix: str, block_format: BlockFormat
) -> dict[str, npt.NDArray]:
    """The tensors of the layer's file with other scales, float32, under the same codes."""
    tensors = {f"{prefix}{name}": value.cpu().numpy() for name, value in layer.rest.items()}
    for name, codes in layer.codes().items():
        halves = scales[name].cpu().numpy().astype(np.float16)
        tensors[f"{prefix}{name}.weight"] = block_format.pack(codes.cpu().numpy(), halves)
    return tensors


def _link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the disk cannot do that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
