"""Optimisation over orthogonal matrices by the Cayley transform: no constraint is left to keep.

R = R0 (I + S)⁻¹ (I − S) with S = A − Aᵀ is orthogonal for every A, and R0 at A = 0, so that A can be
learned by any unconstrained optimiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

#: Adam's averages: short ones, since the learning takes a few hundred steps.
BETAS = (0.9, 0.95)


def cayley(a: torch.Tensor) -> torch.Tensor:
    """``(I + S)⁻¹ (I − S)`` with ``S = A − Aᵀ``, of each square matrix of ``[..., n, n]``."""
    if a.dim() > 2:
        # not in one call: once torch.set_num_threads was called, LU of several fails (quantize/gptq.py, _solve)
        return torch.stack([cayley(each) for each in a])
    s = a - a.mT
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return torch.linalg.solve(eye + s, eye - s)


def optimise(
    start: torch.Tensor,
    loss: Callable[[torch.Tensor, int], torch.Tensor],
    steps: int,
    lr: float,
    report: Callable[[float], None],
) -> torch.Tensor:
    """Minimise ``loss(R, step)`` from ``R0 = start`` with Adam and a cosine learning rate.

    Args:
        start: float64 ``[..., n, n]``, orthogonal, on the device to compute on.
        loss: gets R as float32 of the same shape and the step's number; returns a scalar.
        steps: number of steps.
        lr: first learning rate; it falls to zero as a cosine.
        report: called with the loss after each step.

    Returns:
        float64 ``[..., n, n]``: orthogonal to float64 rounding, since the last transform is made in
        float64 from the learned A.
    """
    base = start.float()
    a = torch.zeros_like(base, requires_grad=True)
    optimiser = torch.optim.Adam([a], lr=lr, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for step in range(steps):
        optimiser.zero_grad()
        value = loss(base @ cayley(a), step)
        value.backward()
        optimiser.step()
        schedule.step()
        report(float(value.detach()))
    learned = a.detach().double()
    # what learning kept is as large as what the last transform needs: gigabytes at 8192
    del a, base, optimiser, schedule
    return start @ cayley(learned)
