"""Rounding that gradients pass through unchanged, for learning on the rounded network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kurtail_gguf.numerics.simulation.rounding import round_to


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor, bits: int, block: int, rounded: Callable[[Tensor, int, int], Tensor]) -> Tensor:
        return rounded(x, bits, block).to(x.dtype)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient, None, None, None


def round_through(x: Tensor, bits: int, block: int, rounded: Callable[[Tensor, int, int], Tensor] = round_to) -> Tensor:
    """:func:`round_to`, bit for bit, with the gradient of the identity; ``rounded`` is another way to the same values.

    The straight-through estimator (Bengio, Léonard, Courville 2013, arXiv:1308.3432); rounding's own
    gradient is zero almost everywhere. Arguments as :func:`round_to`'s; float64 is rounded in float32 and
    stays float64.
    """
    return _StraightThrough.apply(x, bits, block, rounded)
