"""What a conversion does to activations: nothing, random rotations, or what one of the methods learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from kurtail_gguf.files.atomic import filling
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.method.calibration.capture import Capture, capture
from kurtail_gguf.method.calibration.tokens import CalibrationTokens
from kurtail_gguf.method.fold.layer import balance_channels
from kurtail_gguf.method.fold.transforms import Transforms, load_transforms
from kurtail_gguf.method.rotation.hadamard import random_rotation
from kurtail_gguf.method.rotation.learn import learn_r1, learn_r1_by_output_error, learn_r2
from kurtail_gguf.method.rotation.objectives import OBJECTIVES
from kurtail_gguf.method.rotation.spinquant import learn_spinquant
from kurtail_gguf.model.loading.checkpoint import Checkpoint
from kurtail_gguf.model.sites import ATTENTION, FFN, FFN_OUTPUT, Site
from kurtail_gguf.model.spec import ModelSpec
from kurtail_gguf.numerics.simulation.runtime import RuntimeRounding

#: Tokens that rotations are learned from, at most: a few thousand of them are kept at each site.
CAPTURED_TOKENS = 8192
#: Which side of the kurtosis counts: R1 must leave flat tokens flat, values have none (rotation/objectives.py).
R1_OBJECTIVE, R2_OBJECTIVE = "kurtosis", "absolute-kurtosis"
#: Sites that get a diagonal. Attention's output has R2, and the cache rounds what a diagonal there would change.
DIAGONALS = (ATTENTION, FFN, FFN_OUTPUT)


def choose_transforms(
    rotation: str,
    checkpoint: Checkpoint,
    tokens: CalibrationTokens | None,
    rounding: RuntimeRounding,
    seed: int,
    work_dir: Path,
    device: torch.device,
    progress: Progress,
) -> Transforms:
    """The transforms that ``rotation`` names; online ones are ``rounding``'s.

    Args:
        rotation: as ``convert --rotation`` has it.
        checkpoint: the model.
        tokens: what is learned from; None where nothing is.
        rounding: what the runtime will round, all linears alike.
        seed: of everything random.
        work_dir: where the result is kept, and taken over from; captured activations are beside it.
        device: where to compute.
        progress: stages of capturing and learning.

    Raises:
        KurtailError: not enough memory for SpinQuant's whole model, or a loss that is not finite.
        SourceError: NaN or infinite weights; the message names the tensor.
    """
    if rotation == "none":
        return Transforms()
    path = work_dir / "transforms.safetensors"
    if path.exists():
        return load_transforms(path)
    if rotation == "hadamard":
        transforms = _random(checkpoint, seed)
    elif rotation == "spinquant":
        transforms = _spinquant(checkpoint, tokens, rounding, seed, device, progress)
    else:
        samples = captured(checkpoint, tokens, work_dir, seed, device, progress)
        transforms = _learn(rotation, seed, checkpoint, samples, device, progress)
    transforms = replace(transforms, online=rounding.online)
    transforms.save(path)
    return transforms


def _learn(
    rotation: str, seed: int, checkpoint: Checkpoint, samples: Capture, device: torch.device, progress: Progress
) -> Transforms:
    """From captured activations, layer by layer."""
    r1, scales = None, {}
    if rotation == "diagonal":
        scales = _scales(checkpoint.spec, samples, DIAGONALS)
    elif rotation == "output":
        r1 = learn_r1_by_output_error(samples.sites(), samples.all_readers(), seed, device, progress)
        scales = _scales(checkpoint.spec, samples, (FFN_OUTPUT,))
    else:
        r1 = learn_r1(samples.sites(), OBJECTIVES[R1_OBJECTIVE], seed, device, progress)
    r2 = learn_r2(samples.all_values(), OBJECTIVES[R2_OBJECTIVE], seed, device, progress)
    return Transforms("none" if r1 is None else "learned", "learned", r1, r2, scales)


def _scales(spec: ModelSpec, samples: Capture, kinds: Sequence[str]) -> dict[str, npt.NDArray[np.float64]]:
    """Diagonals of the sites of some kinds that can have one, by name, as :class:`Transforms` has them."""
    found: dict[str, list[npt.NDArray[np.float64] | None]] = {}
    for layer in range(spec.layers):
        sites: dict[str, Site] = {}
        for site in spec.at(layer).sites:
            if site.kind in kinds and (site.norm or site.source is not None):
                sites.setdefault(site.diagonal, site)
        for name, site in sites.items():
            rows = found.setdefault(name, [None] * spec.layers)
            rows[layer] = _balanced(site, samples.channels(layer, name), samples.columns(layer, name))
    scales = {}
    for name, rows in found.items():
        known = next(row for row in rows if row is not None)
        scales[name] = np.stack([np.ones_like(known) if row is None else row for row in rows])
    return scales


def _balanced(site: Site, channels: npt.NDArray[np.float32], columns: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    if channels.ndim > 1:
        return np.stack([_balanced(site, *of) for of in zip(channels, columns, strict=True)])
    shared = (site.shared(torch.from_numpy(values).double().square()).sqrt() for values in (channels, columns))
    return balance_channels(*shared).numpy()


def _spinquant(
    checkpoint: Checkpoint,
    tokens: CalibrationTokens,
    rounding: RuntimeRounding,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> Transforms:
    """From the rotations of ``--rotation hadamard``, so that the two differ by the learning alone."""
    start = _random(checkpoint, seed)
    r1, r2 = learn_spinquant(checkpoint, tokens.ids, (start.r1, start.r2), rounding, seed, device, progress)
    return Transforms("learned", "learned", r1, r2)


def _random(checkpoint: Checkpoint, seed: int) -> Transforms:
    """R1 and R2 at random, as ``--rotation hadamard`` folds them: no calibration is needed."""
    spec = checkpoint.spec
    rng = np.random.default_rng((seed, 0))
    r1_kind, r1 = random_rotation(spec.hidden_size, rng)
    heads = [random_rotation(spec.head_dim, rng) for _ in range(spec.layers * spec.kv_heads)]
    shape = (spec.layers, spec.kv_heads, spec.head_dim, spec.head_dim)
    r2 = np.stack([matrix for _, matrix in heads]).reshape(shape)
    return Transforms(r1_kind, heads[0][0], r1, r2)


def captured(
    checkpoint: Checkpoint,
    tokens: CalibrationTokens,
    work_dir: Path,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> Capture:
    """Activations of the first :data:`CAPTURED_TOKENS`, kept in the work directory and taken over from there."""
    target = work_dir / "capture"
    if not target.exists():
        with filling(target) as directory:
            sequences = -(-CAPTURED_TOKENS // tokens.ids.shape[1])
            capture(checkpoint, tokens.ids[:sequences], directory, seed, device, progress)
    return Capture.of(target, checkpoint.spec)
