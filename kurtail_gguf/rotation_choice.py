"""Which R1 and R2 a conversion folds in: none, random ones, or learned by one of the methods."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from kurtail_gguf.calibration.capture import Capture, capture
from kurtail_gguf.calibration.tokens import CalibrationTokens
from kurtail_gguf.config import ConvertConfig
from kurtail_gguf.fold.layer import balance_channels
from kurtail_gguf.loading.checkpoint import Checkpoint
from kurtail_gguf.progress import Progress
from kurtail_gguf.rotation.hadamard import random_rotation
from kurtail_gguf.rotation.learn import learn_r1, learn_r1_by_output_error, learn_r2
from kurtail_gguf.rotation.objectives import OBJECTIVES
from kurtail_gguf.rotation.spinquant import learn_spinquant
from kurtail_gguf.rotation.store import Rotations, load_rotations, save_rotations
from kurtail_gguf.simulation.runtime import RuntimeRounding
from kurtail_gguf.workdir import filling

#: Tokens that rotations are learned from, at most: a few thousand of them are kept at each site.
CAPTURED_TOKENS = 8192
#: Which side of the kurtosis counts: R1 must leave flat tokens flat, values have none (rotation/objectives.py).
R1_OBJECTIVE, R2_OBJECTIVE = "kurtosis", "absolute-kurtosis"


def choose_rotations(
    config: ConvertConfig,
    checkpoint: Checkpoint,
    tokens: CalibrationTokens | None,
    rounding: RuntimeRounding,
    work_dir: Path,
    device: torch.device,
    progress: Progress,
) -> Rotations:
    """The rotations that ``config.rotation`` names.

    Args:
        config: of the conversion.
        checkpoint: the model.
        tokens: what is learned from; None where nothing is.
        rounding: what the runtime will round, all linears alike.
        work_dir: where the result is kept, and taken over from; captured activations are beside it.
        device: where to compute.
        progress: stages of capturing and learning.

    Raises:
        KurtailError: not enough memory for SpinQuant's whole model, or a loss that is not finite.
        SourceError: NaN or infinite weights; the message names the tensor.
    """
    if config.rotation == "none":
        return Rotations()
    path = work_dir / "rotations.safetensors"
    if path.exists():
        return load_rotations(path)
    if config.rotation == "hadamard":
        rotations = _random(checkpoint, config.seed)
    elif config.rotation == "spinquant":
        rotations = _spinquant(checkpoint, tokens, rounding, config.seed, device, progress)
    else:
        samples = captured(checkpoint, tokens, work_dir, config.seed, device, progress)
        rotations = _learn(config, checkpoint, samples, device, progress)
    save_rotations(rotations, path)
    return rotations


def _learn(
    config: ConvertConfig, checkpoint: Checkpoint, samples: Capture, device: torch.device, progress: Progress
) -> Rotations:
    """R1 and R2 from captured activations, layer by layer."""
    if config.rotation == "output":
        r1 = learn_r1_by_output_error(samples.sites(), samples.all_readers(), config.seed, device, progress)
        # an expert's channels are seen by few tokens, and are left as they are
        scales = None if checkpoint.spec.experts else _channel_scales(checkpoint, samples)
    else:
        scales = None
        r1 = learn_r1(samples.sites(), OBJECTIVES[R1_OBJECTIVE], config.seed, device, progress)
    r2 = learn_r2(samples.all_values(), OBJECTIVES[R2_OBJECTIVE], config.seed, device, progress)
    return Rotations("learned", "learned", r1, r2, scales)


def _channel_scales(checkpoint: Checkpoint, samples: Capture) -> np.ndarray:
    down = f"{checkpoint.spec.family.ffn_writer}.weight"
    return np.stack([
        balance_channels(
            torch.from_numpy(samples.channels(layer)),
            checkpoint.tensor(checkpoint.spec.layer_prefix(layer) + down),
        ).numpy()
        for layer in range(samples.layers)
    ])  # fmt: skip


def _spinquant(
    checkpoint: Checkpoint,
    tokens: CalibrationTokens,
    rounding: RuntimeRounding,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> Rotations:
    """From the rotations of ``--rotation hadamard``, so that the two differ by the learning alone."""
    start = _random(checkpoint, seed)
    r1, r2 = learn_spinquant(checkpoint, tokens.ids, (start.r1, start.r2), rounding, seed, device, progress)
    return Rotations("learned", "learned", r1, r2)


def _random(checkpoint: Checkpoint, seed: int) -> Rotations:
    """R1 and R2 at random, as ``--rotation hadamard`` folds them: no calibration is needed."""
    spec = checkpoint.spec
    rng = np.random.default_rng((seed, 0))
    r1_kind, r1 = random_rotation(spec.hidden_size, rng)
    heads = [random_rotation(spec.head_dim, rng) for _ in range(spec.layers * spec.kv_heads)]
    shape = (spec.layers, spec.kv_heads, spec.head_dim, spec.head_dim)
    r2 = np.stack([matrix for _, matrix in heads]).reshape(shape)
    return Rotations(r1_kind, heads[0][0], r1, r2)


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
    return Capture(target, checkpoint.spec.layers)
