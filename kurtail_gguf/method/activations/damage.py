"""What rounding each linear's input costs: the first-order change of the divergence if it were not rounded.

With e = x̂ − x the rounding error of a linear's input and g the gradient of the divergence by x̂, Σ⟨g, e⟩ over the
tokens is how fast the divergence falls as that one input's error shrinks. Where the divergence is quadratic in errors
that are independent of each other this is twice what the input contributes to it, so it ranks the linears, cross terms
with the other errors included. One forward and one backward pass give it for all of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.method.tuning.scales import Outside, divergence
from kurtail_gguf.method.tuning.student import Student
from kurtail_gguf.method.tuning.teacher import Teacher
from kurtail_gguf.numerics.simulation.rounding import round_to


class DamageMeter:
    """Adds up ⟨g, e⟩ of every linear; :meth:`rounded` is what a Student that is measured rounds with."""

    def __init__(self) -> None:
        #: by the weights' full names, in the unit of what was differentiated
        self.totals: dict[str, float] = defaultdict(float)

    def rounded(self, x: Tensor, weight: str, bits: int, block: int) -> Tensor:
        """As ``round_through``; each backward pass through the result adds to the total of ``weight``."""

        def add(damage: float) -> None:
            self.totals[weight] += damage

        return _Measured.apply(x, bits, block, add)


class _Measured(torch.autograd.Function):
    # The sum is taken going backward: a layer's forward pass runs again when its activations are recomputed.
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, block: int, add: Callable[[float], None]) -> Tensor:
        rounded = round_to(x, bits, block).to(x.dtype)
        ctx.save_for_backward(rounded - x)
        ctx.add = add
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (error,) = ctx.saved_tensors
        ctx.add(float((gradient * error).sum(dtype=torch.float64)))
        return gradient, None, None, None


def measure(
    student: Student,
    meter: DamageMeter,
    teacher: Teacher,
    outside: Outside,
    ids: npt.NDArray[np.int32],
    device: torch.device,
    progress: Progress,
) -> tuple[dict[str, float], float]:
    """Damage of every linear, a sequence at a time.

    Args:
        student: rounds with the meter.
        meter: new; a second measurement needs another.
        teacher: says what is right for ``ids``.
        outside: embedding and head of the quantized model.
        ids: tokens, int32 ``[sequences, length]``.
        device: where to compute.
        progress: advanced once a sequence, with its divergence.

    Returns:
        Damages in nats a token by the weights' full names, and the mean divergence.

    Raises:
        KurtailError: a divergence that is not finite.
    """
    mean = 0.0
    with progress.stage("measure damage", len(ids)) as stage:
        for sequence in range(len(ids)):
            loss = divergence(student, teacher, outside, ids, np.array([sequence]), device)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise KurtailError(
                    f"measuring damage: the divergence is {value} on sequence {sequence}; give --activations 4 or 8"
                )
            loss.backward()
            mean += value / len(ids)
            stage.advance(1, f"divergence {value:.3f}")
    return {weight: total / len(ids) for weight, total in meter.totals.items()}, mean
