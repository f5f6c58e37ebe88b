"""Tune the block scales of a quantized model so that it says what the unquantized one says.

The codes stay as GPTQ chose them; their scales are the file's only numbers left that are not integers, and 1/64 of
its weights. They are learned by the Kullback-Leibler divergence of the quantized network's predictions from the
unquantized network's, with everything rounded that the runtime rounds and straight-through gradients there. Tuning
step sizes end to end is the second phase of EfficientQAT (Chen et al. 2024, arXiv:2407.11062); here the activations
and the cache are 4-bit too, and what scales can do against their noise is most of the gain.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kurtail_gguf.files.atomic import replacing
from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.method.tuning.student import Student
from kurtail_gguf.method.tuning.teacher import Teacher
from kurtail_gguf.model.ending import Ending

#: First learning rate as a share of a linear's median scale; it rises over a few steps and falls to zero as a cosine.
LR = 2e-3
WARM_UP = 5
#: Adam's averages.
BETAS = (0.9, 0.95)
#: Tokens of a step, as far as whole sequences go.
STEP_TOKENS = 512
#: Steps between two states on disk.
SAVE_EVERY = 10


@dataclass(frozen=True, eq=False, slots=True)
class Outside:
    """What surrounds the layers in the file.

    Args:
        embed: what tokens put on the residual stream, float32 ``[n, hidden]`` for ids int64 ``[n]``.
        head: float32 ``[vocab, hidden]``, with R1 folded in, and the final norm's gain where R1 is.
        ending: the final norm, and what becomes of the products with the head.
    """

    embed: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]]
    head: Tensor
    ending: Ending


def tune_scales(
    student: Student,
    teacher: Teacher,
    outside: Outside,
    ids: npt.NDArray[np.int32],
    steps: int,
    state: Path,
    device: torch.device,
    progress: Progress,
    lr: float = LR,
) -> list[dict[str, Tensor]]:
    """Learn the student's scales, :data:`STEP_TOKENS` tokens a step, in the order of ``ids``.

    Args:
        student: its ``scales`` are where learning starts, and are changed.
        teacher: says what is right.
        outside: embedding and head of the quantized model.
        ids: calibration tokens, int32 ``[sequences, length]``.
        steps: number of steps.
        state: a file that is written every few steps; where it exists, learning goes on from it and ends with the
            same scales as without the interruption.
        device: where to compute.
        progress: advanced once a step that is still to do, with the divergence.
        lr: first learning rate, as a share of a linear's median scale.

    Returns:
        The scales, rounded to half precision as the file will have them; float32.

    Raises:
        KurtailError: a divergence that is not finite.
    """
    parameters = [scale for layer in student.scales for scale in layer.values()]
    for parameter in parameters:
        parameter.requires_grad_()
    # Adam's steps are as large as the rate whatever the gradient, and linears differ a hundredfold in their scales
    groups = [{"params": [parameter], "lr": lr * float(parameter.detach().abs().median())} for parameter in parameters]
    optimiser = torch.optim.Adam(groups, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps))
    first = _resume(state, parameters, optimiser, schedule)
    with progress.stage("tune scales" if not first else f"tune scales, from step {first} on", steps - first) as stage:
        for step in range(first, steps):
            loss = _step(student, teacher, outside, ids, _sequences(step, ids), optimiser, device)
            schedule.step()
            stage.advance(1, f"divergence {loss:.3f}")
            if (step + 1) % SAVE_EVERY == 0 and step + 1 < steps:
                _save(state, parameters, optimiser, step + 1)
    return [{name: scale.detach().half().float() for name, scale in layer.items()} for layer in student.scales]


def _sequences(step: int, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    count = max(1, STEP_TOKENS // ids.shape[1])
    return np.arange(step * count, (step + 1) * count) % len(ids)


def divergence(
    student: Student,
    teacher: Teacher,
    outside: Outside,
    ids: npt.NDArray[np.int32],
    sequences: npt.NDArray[np.int64],
    device: torch.device,
) -> Tensor:
    """Kullback-Leibler divergence of the student's predictions from the teacher's, in nats a token, with its graph.

    Arguments as :func:`tune_scales`'s; ``sequences`` are the rows of ``ids`` it is taken over.
    """
    tokens = ids[sequences].astype(np.int64)
    embedded = torch.from_numpy(outside.embed(tokens.reshape(-1))).to(device).unflatten(0, tokens.shape)
    hidden = student.hidden(embedded).flatten(0, 1)
    ending = outside.ending
    found = torch.log_softmax(ending.logits(ending.normed(hidden) @ outside.head.T), -1)
    with torch.no_grad():
        right = teacher.log_probabilities(sequences)
    return torch.nn.functional.kl_div(found, right, reduction="batchmean", log_target=True)


def _step(student, teacher, outside, ids, sequences, optimiser, device) -> float:
    loss = divergence(student, teacher, outside, ids, sequences, device)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise KurtailError(f"tuning scales: the divergence is {value} on sequence {sequences[0]}; give --tune 0")
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return value


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _save(path: Path, parameters: list[Tensor], optimiser: torch.optim.Adam, step: int) -> None:
    """Scales and both of Adam's averages after ``step`` steps, atomically."""
    tensors = {}
    for number, parameter in enumerate(parameters):
        kept = optimiser.state[parameter]
        tensors[f"{number}.scale"] = parameter.detach()
        tensors[f"{number}.mean"], tensors[f"{number}.square"] = kept["exp_avg"], kept["exp_avg_sq"]
    with replacing(path) as scratch:
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, scratch, {"step": str(step)})


def _resume(path: Path, parameters, optimiser, schedule) -> int:
    """Put the saved state back; the number of steps it has seen."""
    if not path.exists():
        return 0
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
    tensors = load_file(path)
    with torch.no_grad():
        for number, parameter in enumerate(parameters):
            parameter.copy_(tensors[f"{number}.scale"])
            optimiser.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": tensors[f"{number}.mean"].to(parameter.device),
                "exp_avg_sq": tensors[f"{number}.square"].to(parameter.device),
            }
    # the schedule is a function of the step alone
    schedule.last_epoch = step
    for group, base, rate in zip(optimiser.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * rate(step)
    return step
