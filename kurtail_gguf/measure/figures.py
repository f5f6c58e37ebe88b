"""What a report shows of every layer: tails of the activations, errors of weights and activations.

Measured when the file's tensors are final, on the first few thousand of the tokens that the conversion read, layer by
layer with never more than one in memory. Nothing of the conversion depends on it.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file

from kurtail_gguf.files.atomic import write_atomically
from kurtail_gguf.measure.outliers import Outliers, measure_outliers
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.method.calibration.tokens import CalibrationTokens
from kurtail_gguf.method.fold.activations import transformed
from kurtail_gguf.method.fold.tables import EmbeddingRows
from kurtail_gguf.method.fold.transforms import Transforms
from kurtail_gguf.method.quantize.layerwise import folded_layer, layer_path, replay
from kurtail_gguf.method.quantize.quantized_prefix import QuantizedPrefix, remove_files
from kurtail_gguf.method.rotation.choice import captured
from kurtail_gguf.model.loading.checkpoint import Checkpoint
from kurtail_gguf.model.spec import ModelSpec
from kurtail_gguf.numerics.formats.targets import BlockFormat
from kurtail_gguf.numerics.simulation.rounding import round_to
from kurtail_gguf.numerics.simulation.runtime import RuntimeRounding

#: Tokens that activations are measured on, as far as whole sequences go.
MEASURED_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured. Errors are relative, ‖x − x̂‖ / ‖x‖ over all values and tokens, by the weights' full names.

    Args:
        text: name of the text that activations are of.
        layers: of the model.
        before: outliers of the model's own activations, attention's and the FFN's of every layer in turn.
        after: those of the same activations transformed; None where they are left as they are.
        weight_errors: of the folded weights against what the file stores; empty where nothing was quantized.
        activation_errors: of what enters the linears of the quantized model, by their bits; empty likewise, and
            without an expert that no token came to.
    """

    text: str
    layers: int
    before: Outliers
    after: Outliers | None
    weight_errors: Mapping[str, float]
    activation_errors: Mapping[str, float]


def measure_figures(
    checkpoint: Checkpoint,
    tokens: CalibrationTokens,
    transforms: Transforms,
    rounding: RuntimeRounding,
    block_format: BlockFormat | None,
    quantized: Path,
    work_dir: Path,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> Figures:
    """Measure a conversion.

    Args:
        checkpoint: the model.
        tokens: what was read for calibration.
        transforms: what was folded in.
        rounding: what the runtime rounds, exceptions included. What comes to a linear is that of a network without
            exceptions.
        block_format: of the block linears; None where they are not quantized.
        quantized: directory of the file's tensors (:func:`layerwise.fold_and_quantize`), tuned where they are.
        work_dir: ``figures`` in it keeps what is measured, layer by layer, and is taken over.
        seed: of the choice of activations where none were captured.
        device: where to compute.
        progress: one stage, and one before it where no activations were captured.

    Raises:
        SourceError: a sliding window below the sequences' length.
    """
    spec = checkpoint.spec
    samples = captured(checkpoint, tokens, work_dir, seed, device, progress)
    directory = work_dir / "figures"
    directory.mkdir(exist_ok=True)
    before, after = samples.sites(), transformed(samples.sites(), samples.kinds, transforms)
    sides = {"before": before} if after is None else {"before": before, "after": after}
    with progress.stage("measure for the report", len(sides) + (0 if block_format is None else 2 * spec.layers)) as stage:
        outliers = {}
        for side, sites in sides.items():
            found = _kept(directory / f"{side}.json", lambda sites=sites: asdict(measure_outliers(sites)))
            outliers[side] = Outliers(**{name: tuple(values) for name, values in found.items()})
            stage.advance(1, f"outliers {side} the transforms")
        weights: dict[str, float] = {}
        activations: dict[str, float] = {}
        if block_format is not None:
            r1 = transforms.r1_on(device)
            for layer in range(spec.layers):

                def weights_of(layer: int = layer) -> dict[str, float]:
                    folded = folded_layer(checkpoint.layer(layer, device, check=True), spec.at(layer), transforms.layer(layer, r1, device))
                    return _weight_errors(spec, layer, folded, layer_path(quantized, layer), block_format)

                weights |= _kept(directory / f"weights-{layer:05d}.json", weights_of)
                stage.advance(1, f"weights of layer {layer}")
            path = directory / "activations.json"
            if path.exists():
                stage.advance(spec.layers, "activations")
            activations = _kept(
                path,
                lambda: _activation_errors(checkpoint, tokens, rounding, block_format, quantized, directory, device, stage),
            )
    return Figures(tokens.name, spec.layers, outliers["before"], outliers.get("after"), weights, activations)


def _kept(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``path`` holds, measured now if it is not there."""
    if not path.exists():
        write_atomically(path, json.dumps(measure(), indent=2) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))


def _weight_errors(
    spec: ModelSpec, layer: int, folded: dict[str, torch.Tensor], path: Path, block_format: BlockFormat
) -> dict[str, float]:
    """Relative errors of one layer's linears in the file ``path``; they are taken out of ``folded``."""
    stored, errors = load_file(path), {}
    for name in spec.at(layer).linears:
        full = f"{spec.layer_prefix(layer)}{name}.weight"
        weight = folded.pop(f"{name}.weight").cpu()
        difference = torch.from_numpy(block_format.dequantize(*block_format.unpack(stored.pop(full)))).sub_(weight)
        error, size = (float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in (difference, weight))
        errors[full] = error / size if size else 0.0
    return errors


def _activation_errors(
    checkpoint: Checkpoint,
    tokens: CalibrationTokens,
    rounding: RuntimeRounding,
    block_format: BlockFormat,
    quantized: Path,
    directory: Path,
    device: torch.device,
    stage: Any,
) -> dict[str, float]:
    """Relative errors of what enters every linear, by taking the tokens through the finished layers once more."""
    spec = checkpoint.spec
    meter = _Meter(spec, rounding)
    alike = replace(rounding, exceptions={}, watch=meter.see)
    embedding = EmbeddingRows(quantized, spec)
    remove_files(directory)
    prefix = QuantizedPrefix(checkpoint, tokens.first(MEASURED_TOKENS).ids, embedding, alike, directory, device)
    for layer in range(spec.layers):
        meter.open(layer)
        replay(prefix, checkpoint, layer, layer_path(quantized, layer), block_format, meter.stop)
        meter.close()
        stage.advance(1, f"activations of layer {layer}")
    prefix.close()
    return meter.errors


class _Meter:
    """Adds up what the roundings of one stop lose, and says of which linears' input that was.

    Args:
        spec: names of the linears.
        rounding: bits of each.
    """

    def __init__(self, spec: ModelSpec, rounding: RuntimeRounding) -> None:
        self._spec, self._rounding = spec, rounding
        self._bits = {rounding.activation_bits, *rounding.exceptions.values()}
        self.errors: dict[str, float] = {}

    def open(self, layer: int) -> None:
        """The layer that comes now."""
        self._above, self._own = self._spec.layer_prefix(layer), self._spec.at(layer)
        self._read: dict[int, float] = {}
        self._owed: tuple[str, ...] = ()
        self._clear()

    def see(self, x: torch.Tensor, rounded: torch.Tensor) -> None:
        """What a stop's linears will read, in parts."""
        self._energy += float(x.square().sum(dtype=torch.float64))
        for bits in self._bits:
            own = rounded if bits == self._rounding.activation_bits else round_to(x, bits, self._rounding.activation_block)
            self._lost[bits] += float((x - own).square().sum(dtype=torch.float64))

    def stop(self, names: tuple[str, ...], hessian: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
        """All that these linears read has been seen."""
        self.close()
        if self._own.experts and names[0] in self._own.ffn_writers:
            # of an expert's down it is seen behind its stop, when the tokens go on
            self._owed = names
        else:
            # experts read the same rows, which are rounded once
            self._read = self._taken() or (self._read if self._own.experts else {})
            self._note(names, self._read)
        return {}

    def close(self) -> None:
        """What was seen since the last stop is its own, where that was an expert's down."""
        if self._owed:
            self._note(self._owed, self._taken())
        self._owed = ()

    def _note(self, names: tuple[str, ...], errors: Mapping[int, float]) -> None:
        full = [f"{self._above}{name}.weight" for name in names]
        self.errors |= {name: errors[self._rounding.bits_of(name)] for name in full if errors}

    def _taken(self) -> dict[int, float]:
        """The relative error by bits; nothing where nothing was seen."""
        found = {bits: math.sqrt(lost / self._energy) for bits, lost in self._lost.items()} if self._energy else {}
        self._clear()
        return found

    def _clear(self) -> None:
        self._energy, self._lost = 0.0, defaultdict(float)
