"""Fold and quantize, one layer at a time: the longest stage of a conversion, each finished layer a checkpoint.

With GPTQ the calibration tokens go along, through the layers as they come out (``quantized_prefix.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file

from kurtail_gguf.files.atomic import replacing
from kurtail_gguf.messages.progress import Progress, Stage
from kurtail_gguf.method.fold.layer import LayerTransforms, fold_layer
from kurtail_gguf.method.fold.tables import EmbeddingRows, fold_tables
from kurtail_gguf.method.fold.transforms import Transforms
from kurtail_gguf.method.quantize.gptq import quantize_gptq
from kurtail_gguf.method.quantize.quantized_prefix import Quantize, QuantizedPrefix, remove_files
from kurtail_gguf.method.quantize.rtn import quantize_rtn
from kurtail_gguf.model.loading.checkpoint import Checkpoint
from kurtail_gguf.model.loading.prefetch import layer_stream
from kurtail_gguf.model.spec import ModelSpec
from kurtail_gguf.numerics.formats.targets import BlockFormat
from kurtail_gguf.numerics.simulation.runtime import RuntimeRounding


@dataclass(frozen=True, eq=False, slots=True)
class CalibratedOn:
    """What GPTQ needs to know: the tokens, int32 ``[sequences, length]``, and what the runtime rounds."""

    ids: npt.NDArray[np.int32]
    rounding: RuntimeRounding


def fold_and_quantize(
    checkpoint: Checkpoint,
    transforms: Transforms,
    block_format: BlockFormat | None,
    calibrated_on: CalibratedOn | None,
    target: Path,
    device: torch.device,
    progress: Progress,
) -> Path:
    """Fold and quantize into ``target``; the layout is the exporter's input.

    What :func:`~kurtail_gguf.method.fold.tables.fold_tables` writes, and ``layer-NNNNN.safetensors`` (HF names; block linears as
    packed rows of ``block_format``, uint8; the rest float32).

    Args:
        checkpoint: the model; weights are checked for NaN as they are read.
        transforms: what to fold.
        block_format: what the block linears are stored as; None leaves them in single precision.
        calibrated_on: quantize with GPTQ on this; None rounds to nearest.
        target: directory of the results; what is there already is taken over.
        device: where to compute.
        progress: a stage for the two tables, one for layers that are there already, one for the others: each has its own
            pace, and so its own ETA.

    Raises:
        SourceError: NaN or infinite weights; the message names the tensor.
        QuantizeError: a weight or a Hessian that cannot be quantized.
    """
    target.mkdir(exist_ok=True)
    spec = checkpoint.spec
    r1 = transforms.r1_on(device)
    prefix = None
    zero: list[str] = []
    fold_tables(checkpoint, r1, target, progress)
    missing = [layer for layer in range(spec.layers) if not layer_path(target, layer).exists()]
    if calibrated_on is not None and missing:
        prefix = QuantizedPrefix(
            checkpoint, calibrated_on.ids, EmbeddingRows(target, spec),
            calibrated_on.rounding, target.parent, device,
        )  # fmt: skip
    start = min(missing, default=spec.layers)
    with layer_stream(checkpoint, missing, device, check=True) as layers:

        def finish(layer: int, stage: Stage) -> str:
            """Make the layer's file, or take the tokens through the one that is there; a few words on it."""
            path, note = layer_path(target, layer), ""
            if layer in missing:
                own = spec.at(layer)
                folded = folded_layer(next(layers), own, transforms.layer(layer, r1, device))
                above = spec.layer_prefix(layer)
                zero.extend(f"{above}{name}" for name in own.linears if not folded[f"{name}.weight"].any())
                one = _Layer(own, layer, folded, block_format, stage)
                del folded
                starved = one.quantize(prefix)
                _save(one.results(), path)
                note = f", {starved} of {spec.experts} experts use all tokens too: too few of their own" if starved else ""
            elif prefix is not None:
                replay(prefix, checkpoint, layer, path, block_format)
            seen = "" if prefix is None else f", kurtosis {' '.join(f'{value:.1f}' for value in prefix.kurtosis)}"
            return f"layer {layer}{seen}{note}"

        for title, part in (("reuse finished layers", range(start)), ("fold and quantize", range(start, spec.layers))):
            if part:
                with progress.stage(title, len(part)) as stage:
                    for layer in part:
                        stage.advance(1, finish(layer, stage))
    if zero:
        _tell_zeros(zero, progress)
    if prefix is None:
        remove_files(target.parent)
    else:
        prefix.close()
    return target


def _tell_zeros(names: list[str], progress: Progress) -> None:
    others = f" and of {len(names) - 1} other linears" if len(names) > 1 else ""
    progress.tell(f"all weights of {names[0]}{others} are 0: the checkpoint is damaged, unless they were pruned")


def layer_path(directory: Path, layer: int) -> Path:
    """Where a layer's tensors are in the directory that :func:`fold_and_quantize` filled."""
    return directory / f"layer-{layer:05d}.safetensors"


def folded_layer(weights: dict[str, torch.Tensor], spec: ModelSpec, transforms: LayerTransforms) -> dict[str, torch.Tensor]:
    """A layer's tensors with everything folded, float32; arguments as :func:`fold_layer`'s."""
    return _single(fold_layer(weights, spec, transforms))


class _Layer:
    """One layer's tensors on their way into the file.

    Args:
        folded: float32 by name below the layer's prefix; a linear leaves it once it is quantized.
        block_format: what linears are quantized to; None where none is.
        stage: told how far GPTQ is with the layer, which takes minutes where it is wide.
    """

    def __init__(
        self, spec: ModelSpec, layer: int, folded: dict[str, torch.Tensor], block_format: BlockFormat | None, stage: Stage
    ) -> None:
        self._number = layer
        self._prefix = spec.layer_prefix(layer)
        self._linears = spec.linears
        self._folded = folded
        self._format = block_format
        self._stage = stage
        self._packed: dict[str, np.ndarray] = {}
        # as GPTQ multiplies every row with its Hessian
        shapes = [folded[f"{name}.weight"].shape for name in spec.linears]
        self._products = sum(rows * inputs**2 for rows, inputs in shapes)
        self._products_done = 0

    def quantize(self, prefix: QuantizedPrefix | None) -> int:
        """With GPTQ where there is a prefix; how many experts saw too few tokens."""
        if prefix is not None:
            return prefix.run_layer(self._number, self._folded, self._gptq)
        if self._format is not None:
            for name in self._linears:
                full = f"{self._prefix}{name}.weight"
                self._pack(name, quantize_rtn(self._folded.pop(f"{name}.weight"), full, self._format.block))
        return 0

    def _gptq(self, names: tuple[str, ...], hessian: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Quantize the linears that share an input; their weights as the file has them, float32 ``[out, in]``."""
        weights = [self._folded.pop(f"{name}.weight") for name in names]
        rows = [len(weight) for weight in weights]
        full = f"{self._prefix}{names[0]}.weight"
        # rows are independent in GPTQ, so linears with one Hessian are one matrix
        joined = torch.cat(weights) if len(weights) > 1 else weights[0]
        del weights
        inputs = joined.shape[1]
        before = self._products_done

        def report(done: int) -> None:
            self._products_done = before + done * inputs**2
            self._stage.within(self._products_done / self._products, f"layer {self._number}, {names[-1]}")

        codes, scales = quantize_gptq(joined, hessian(), full, self._format.block, report=report)
        del joined
        ends = np.cumsum(rows)[:-1]
        result = {}
        for name, own_codes, own_scales in zip(names, np.split(codes, ends), np.split(scales, ends), strict=True):
            self._pack(name, (own_codes, own_scales))
            result[name] = torch.from_numpy(self._format.dequantize(own_codes, own_scales))
        return result

    def results(self) -> dict[str, np.ndarray]:
        """All tensors of the layer by full name: packed rows, and the rest in single precision."""
        tensors = {f"{name}.weight": rows for name, rows in self._packed.items()}
        tensors |= {name: value.cpu().numpy() for name, value in self._folded.items()}
        return {self._prefix + name: value for name, value in tensors.items()}

    def _pack(self, name: str, quantized: tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]) -> None:
        self._packed[name] = self._format.pack(*quantized)


def _single(folded: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same in single precision; each tensor is let go as it is converted."""
    return {name: folded.pop(name).float() for name in list(folded)}


def _nothing_changes(names: tuple[str, ...], hessian: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    return {}


def replay(
    prefix: QuantizedPrefix,
    checkpoint: Checkpoint,
    layer: int,
    path: Path,
    block_format: BlockFormat,
    at_stops: Quantize = _nothing_changes,
) -> None:
    """Take the tokens through a finished layer, the file ``path``; ``at_stops`` sees the stops and changes nothing."""
    above = checkpoint.spec.layer_prefix(layer)
    stored = {name.removeprefix(above): value for name, value in load_file(path).items()}
    weights = {
        name: torch.from_numpy(
            block_format.dequantize(*block_format.unpack(value)) if value.dtype == np.uint8 else value
        ).to(prefix.device)
        for name, value in stored.items()
    }
    prefix.run_layer(layer, weights, at_stops)


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    with replacing(path) as scratch:
        save_file(tensors, scratch)
