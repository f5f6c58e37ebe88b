"""Cayley SGD: gradient descent on orthogonal matrices by an iterative Cayley retraction.

Algorithm 1 of Li, Fuxin, Todorovic 2020 (arXiv:2002.01113) for square matrices, as SpinQuant uses it.
With the Euclidean gradient G at X:

    M ← β M − G                                      momentum
    Ŵ = M Xᵀ − ½ X (Xᵀ M Xᵀ),  W = Ŵ − Ŵᵀ            projection on the tangent space: skew-symmetric
    M ← W X                                          momentum in the tangent space
    α = min(lr, 2 q / (‖W‖₁ + ε))                    so that the iteration below contracts
    Y ← X + α M, then s times  Y ← X + α/2 W (X + Y)

The iteration tends to the Cayley transform Y = (I − α/2 W)⁻¹ (I + α/2 W) X, which is orthogonal. After
s iterations Y is within 2 qˢ⁺² of it in spectral norm (the tail of the Neumann series, whose factor
(I − α/2 W)⁻¹ has norm 1 at most), typically far closer, since ‖W‖₁ overestimates the spectral norm.
What is left of the error's symmetric part is removed after every step, where it shows, by
Newton–Schulz iterations for the polar factor, so that iterates stay within :data:`MAX_DEFECT`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

#: q: α/2 ‖W‖₁ is at most this.
CONTRACTION = 0.5
#: s: SpinQuant's; the paper of the algorithm takes 2.
ITERATIONS = 5
#: Largest |XᵀX − I| of a start or an iterate, by dtype.
MAX_DEFECT = {torch.float64: 1e-12, torch.float32: 1e-5}

_EPSILON = 1e-8
#: From the worst that s = 2 leaves (an eighth) to float64's rounding takes six.
_POLAR_ITERATIONS = 8


class CayleySGD(torch.optim.Optimizer):
    """Minimises over orthogonal matrices, each of a batch on its own.

    Args:
        params: orthogonal ``[..., n, n]``, float64 or float32.
        lr: largest step α; steps are shorter wherever the gradient is large.
        momentum: β.
        iterations: s.

    Raises:
        ValueError: a parameter that is not square, not of those dtypes, or not orthogonal.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float = 0.0, iterations: int = ITERATIONS
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "iterations": iterations})
        for group in self.param_groups:
            for x in group["params"]:
                if x.ndim < 2 or x.shape[-1] != x.shape[-2] or x.dtype not in MAX_DEFECT:
                    raise ValueError(f"{x.dtype} {list(x.shape)}: square float64 or float32 matrices are needed")
                if not defect(x) <= MAX_DEFECT[x.dtype]:
                    raise ValueError(
                        f"|XᵀX − I| is {defect(x):.1e}, but at most {MAX_DEFECT[x.dtype]:.0e} for an orthogonal matrix"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step from the gradients that ``backward`` left."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is not None:
                    self._update(x, group)
        return loss

    def _update(self, x: Tensor, group: dict[str, Any]) -> None:
        state = self.state[x]
        m = -x.grad
        if "momentum" in state:
            m += group["momentum"] * state["momentum"]
        w_hat = m @ x.mT - 0.5 * x @ (x.mT @ (m @ x.mT))
        w = w_hat - w_hat.mT
        state["momentum"] = m = w @ x
        norm = w.abs().sum(-2).amax(-1)[..., None, None]
        alpha = (2 * CONTRACTION / (norm + _EPSILON)).clamp_max(group["lr"])
        y = x + alpha * m
        for _ in range(group["iterations"]):
            y = x + alpha / 2 * (w @ (x + y))
        x.copy_(polar(y))


@torch.no_grad()
def defect(x: Tensor) -> float:
    """Largest entry of |XᵀX − I|."""
    return float((x.mT @ x - torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)).abs().max())


def polar(x: Tensor) -> Tensor:
    """The orthogonal matrix next to ``x``, by Newton–Schulz iterations X ← X (3 I − XᵀX) / 2.

    They converge quadratically where ‖XᵀX − I‖ < 1 (Higham, Functions of Matrices, 2008, section 8.3);
    a matrix that is orthogonal already is returned as it is.

    Args:
        x: float64 or float32 ``[..., n, n]``, nearly orthogonal.
    """
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    for _ in range(_POLAR_ITERATIONS):
        gram = x.mT @ x
        if (gram - eye).abs().max() <= MAX_DEFECT[x.dtype]:
            break
        x = x @ (1.5 * eye - 0.5 * gram)
    return x
