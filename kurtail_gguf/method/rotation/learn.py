"""Learn R1 (one for the residual stream) and R2 (a layer's KV heads) from captured activations.

KurTail (arXiv:2503.01483) learns both by the kurtosis of what is quantized: R1 of the inputs of
attention and FFN, R2 of the values. A token counts as one sample, wherever in the model it was seen.
Both start from a random Hadamard matrix where one of that order is known: it already spreads single
outlier channels evenly over all others, which a random orthogonal matrix does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.method.rotation.cayley import optimise
from kurtail_gguf.method.rotation.hadamard import random_rotation
from kurtail_gguf.method.rotation.objectives import Objective, output_error_loss

#: Steps, first learning rate and tokens a step (over all sites) of R1: 25 s for hidden 576 on two cores.
R1_STEPS, R1_LR, R1_TOKENS = 150, 5e-3, 2400
#: The same of R2; its tokens are per layer.
R2_STEPS, R2_LR, R2_TOKENS = 80, 1e-2, 256
#: Steps and first learning rate of R1 by output error; sites drawn for a step, and tokens of each. With a third of the
#: steps, or of the tokens, a fifth less of what rounding costs was won back (docs/quality.md); 70 s for hidden 576.
OUTPUT_STEPS, OUTPUT_LR, OUTPUT_SITES, OUTPUT_TOKENS = 600, 8e-3, 12, 256
#: One row in so many of a site's sketch is taken in a step, another every time; with all of them it took twice as long.
OUTPUT_ROWS_SHARE = 4


def learn_r1(
    sites: Sequence[npt.NDArray[np.floating]],
    objective: Objective,
    seed: int,
    device: torch.device,
    progress: Progress,
    steps: int = R1_STEPS,
) -> npt.NDArray[np.float64]:
    """One rotation of the residual stream for all sites.

    Args:
        sites: x̂ ``[tokens, hidden]`` at each site, memory-mapped or not.
        objective: what to minimise, of rotated tokens.
        seed: seed of the start and of the choice of tokens.
        device: where to compute.
        progress: advanced once a step.
        steps: number of steps.

    Returns:
        R1, float64 ``[hidden, hidden]``; row vectors are rotated as ``x @ R1``.
    """
    rng = np.random.default_rng((seed, 1))
    hidden = sites[0].shape[-1]
    start = torch.from_numpy(random_rotation(hidden, rng)[1]).to(device)
    share = max(1, R1_TOKENS // len(sites))

    def loss(rotation: torch.Tensor, _step: int) -> torch.Tensor:
        picked = [_pick(site, share, rng) for site in sites]
        x = torch.from_numpy(np.concatenate(picked)).to(device)
        return objective(x @ rotation)

    with progress.stage("learn R1", steps) as stage:
        report = _reporter(stage)
        return optimise(start, loss, steps, R1_LR, report).cpu().numpy()


def learn_r1_by_output_error(
    sites: Sequence[npt.NDArray[np.floating]],
    readers: Sequence[npt.NDArray[np.float32]],
    seed: int,
    device: torch.device,
    progress: Progress,
    steps: int = OUTPUT_STEPS,
) -> npt.NDArray[np.float64]:
    """One rotation of the residual stream by :func:`~kurtail_gguf.method.rotation.objectives.output_error_loss`.

    Args:
        sites, seed, device, progress, steps: as in :func:`learn_r1`.
        readers: for each site the sketch of what reads it, float32 ``[rows, hidden]``.

    Returns:
        R1, float64 ``[hidden, hidden]``.
    """
    rng = np.random.default_rng((seed, 1))
    start = torch.from_numpy(random_rotation(sites[0].shape[-1], rng)[1]).to(device)
    chosen = min(OUTPUT_SITES, len(sites))

    def loss(rotation: torch.Tensor, _step: int) -> torch.Tensor:
        total = torch.zeros((), device=device)
        for site in rng.choice(len(sites), chosen, replace=False):
            x = torch.from_numpy(_pick(sites[site], OUTPUT_TOKENS, rng)).to(device)
            sketch = torch.from_numpy(_some_rows(readers[site], OUTPUT_ROWS_SHARE, rng)).to(device)
            total = total + output_error_loss(x @ rotation, sketch @ rotation)
        return total / chosen

    with progress.stage("learn R1", steps) as stage:
        return optimise(start, loss, steps, OUTPUT_LR, _reporter(stage)).cpu().numpy()


def learn_r2(
    values: Sequence[npt.NDArray[np.floating]],
    objective: Objective,
    seed: int,
    device: torch.device,
    progress: Progress,
    steps: int = R2_STEPS,
) -> npt.NDArray[np.float64]:
    """A rotation of the values for every KV head of every layer, a layer's heads at a time.

    Args:
        values: outputs of v_proj ``[tokens, kv_heads, head_dim]`` of each layer.
        objective, seed, device, steps: as in :func:`learn_r1`.
        progress: advanced once a layer.

    Returns:
        R2, float64 ``[layers, kv_heads, head_dim, head_dim]``.
    """
    rotations = []
    with progress.stage("learn R2", len(values)) as stage:
        for layer, seen in enumerate(values):
            rng = np.random.default_rng((seed, 2, layer))
            heads, head_dim = seen.shape[1:]
            start = np.stack([random_rotation(head_dim, rng)[1] for _ in range(heads)])
            last = []

            def loss(rotation: torch.Tensor, _step: int, seen=seen, rng=rng) -> torch.Tensor:
                v = torch.from_numpy(_pick(seen, R2_TOKENS, rng)).to(device)
                return objective(v.transpose(0, 1) @ rotation)

            learned = optimise(torch.from_numpy(start).to(device), loss, steps, R2_LR, last.append)
            rotations.append(learned.cpu().numpy())
            stage.advance(1, f"layer {layer}, loss {last[-1]:.3f}")
    return np.stack(rotations)


def _pick(seen: npt.NDArray[np.floating], count: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """``count`` random tokens with replacement, sorted so that a mapped file is read forwards."""
    return seen[np.sort(rng.integers(0, len(seen), count))].astype(np.float32)


def _some_rows(rows: npt.NDArray[np.floating], share: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """One in ``share`` of the rows at random; the squares of its columns have the expectation of all rows'."""
    if len(rows) <= share:
        return np.array(rows, np.float32)
    picked = np.sort(rng.choice(len(rows), len(rows) // share, replace=False))
    return rows[picked].astype(np.float32) * np.float32(np.sqrt(len(rows) / len(picked)))


def _reporter(stage):
    return lambda value: stage.advance(1, f"loss {value:.3f}")
