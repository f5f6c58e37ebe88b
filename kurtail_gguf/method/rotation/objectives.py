"""What a rotation is learned for: losses of rotated activations, smaller is better.

To add one: a function ``[..., n] -> scalar``, a row in :data:`OBJECTIVES`, and its name where rotations are chosen,
:mod:`kurtail_gguf.method.rotation.choice`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

#: Kurtosis of a uniform distribution, which a uniform quantizer fits best.
UNIFORM_KURTOSIS = 1.8

Objective = Callable[[torch.Tensor], torch.Tensor]


def token_kurtosis(x: torch.Tensor) -> torch.Tensor:
    """κ = E[(x − μ)⁴] / σ⁴ over the last axis, biased moments, not "excess".

    Args:
        x: floating ``[..., n]``.

    Returns:
        ``[...]``; 3 for a normal distribution, 1.8 for a uniform one.
    """
    centred = x - x.mean(-1, keepdim=True)
    squares = centred.square()
    # The floor only matters for constant rows, whose kurtosis is undefined.
    return squares.square().mean(-1) / squares.mean(-1).square().clamp_min(1e-12)


def kurtosis_loss(x: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of max(κ − 1.8, 0), a scalar: KurTail's objective without its lower side.

    KurTail (Akhondzadeh et al. 2025, arXiv:2503.01483) minimises |κ − 1.8|. A token with κ below 1.8
    is flatter than uniform and quantizes better still: a Hadamard start brings the massive
    activations of sequence-first tokens to κ = 1…1.4, and pulling them back to 1.8 doubles their error
    and raises the perplexity (see :func:`absolute_kurtosis_loss`).
    """
    return (token_kurtosis(x) - UNIFORM_KURTOSIS).clamp_min(0).mean()


def absolute_kurtosis_loss(x: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of |κ − 1.8|, a scalar: the paper's formula.

    R2 is learned by it: with the one-sided loss the perplexity of SmolLM2-135M was 3 to 7 higher, at
    two seeds each.
    """
    return (token_kurtosis(x) - UNIFORM_KURTOSIS).abs().mean()


def output_error_loss(x: torch.Tensor, readers: torch.Tensor, block: int = 64) -> torch.Tensor:
    """Rounding error expected at the outputs of the linears that read ``x``, a scalar.

    A block's rounding errors are as large as its scale, hence as its largest magnitude, and alike in all its
    channels: they change the outputs by max²_b · Σ_{j in b} ‖A_j‖² with the readers' columns A_j. Unlike kurtosis
    this knows that a block of its own scale may hold the outliers, and that channels differ in what reads them.

    Args:
        x: rotated activations, floating ``[tokens, n]``.
        readers: sketch of the linears in the same basis, ``[rows, n]`` (``Capture.readers``).
        block: values that share a scale.
    """
    largest = x.reshape(len(x), -1, block).abs().amax(-1).square().mean(0)
    energy = readers.square().sum(0).reshape(-1, block).sum(-1)
    return (largest * energy).sum()


OBJECTIVES: dict[str, Objective] = {
    "kurtosis": kurtosis_loss,
    "absolute-kurtosis": absolute_kurtosis_loss,
}
