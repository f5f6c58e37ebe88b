"""Round to nearest, with the scale of every block searched for the least squared error.

The scale that maps the signed maximum to −8 is the plain one; shrinking it clips the maximum but
rounds everything else more finely, and the opposite sign spends the sixteenth level on the other
side. A least-squares refit of the scale to the chosen codes comes last. The scale that codes are
chosen by is always the half-rounded one that is stored.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from kurtail_gguf.machine.memory import is_card
from kurtail_gguf.messages.errors import QuantizeError
from kurtail_gguf.numerics.formats.kt4 import BLOCK, HALF_MAX, LEVELS

#: Candidate scales as factors of signed maximum / −8: those that the runtime tries for activations, and more that clip
#: further. Negative: the maximum goes to +7 and beyond.
FACTORS: Final = (
    *(32 / level for level in LEVELS), 0.84, 0.80, 0.76, 0.72, 0.66,
    -1.14, -1.08, -1.02, -0.96, -0.90, -0.84, -0.78, -0.72,
)  # fmt: skip
#: Refits of the scale to its codes, each followed by choosing the codes anew.
REFITS: Final = 2
#: Blocks searched at once: of 64 float32 they are 1 MiB, which stays in a core's cache; on a GPU 64 MiB, since every
#: step of a search is a call of its own there.
_CHUNK: Final = 4096
_CARD_CHUNK: Final = 1 << 18


def quantize_rtn(
    weight: torch.Tensor, name: str, block: int = BLOCK
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Codes and scales of a weight matrix.

    Args:
        weight: finite, floating ``[out_features, in_features]``, in_features a multiple of ``block``;
            searched in float32 on its device.
        name: the tensor's name, for the error.
        block: values along a row that share a scale.

    Returns:
        codes int8 ``[out, in]`` in −8…7 and scales float16 ``[out, in/block]``.

    Raises:
        QuantizeError: a weight so large that its block's scale does not fit a half.
    """
    rows, columns = weight.shape
    if columns % block:
        raise ValueError(f"{name}: rows of {columns} values are not a multiple of the block of {block}")
    blocks = weight.float().reshape(-1, block)
    codes = torch.empty(blocks.shape, dtype=torch.int8, device=blocks.device)
    scales = torch.empty(len(blocks), dtype=torch.float16, device=blocks.device)
    largest = float(blocks.abs().max())
    limit = HALF_MAX * 8 / max(abs(factor) for factor in FACTORS)
    if largest > limit:
        raise QuantizeError(
            f"tensor {name}: a weight of {largest:.4g} needs a block scale that exceeds half precision (limit "
            f"{limit:.4g}): the checkpoint is damaged"
        )
    step = _CARD_CHUNK if is_card(blocks.device) else _CHUNK
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        codes[part], scales[part] = _search(blocks[part])
    return codes.reshape(rows, columns).cpu().numpy(), scales.reshape(rows, -1).cpu().numpy()


def _search(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Best codes int8 ``[n, block]`` and scales float16 ``[n]`` of blocks float32 ``[n, block]``."""
    signed_max = x.gather(1, x.abs().argmax(1, keepdim=True))
    best_scale = _half(signed_max / -8)
    best_error = _error(x, best_scale)
    for factor in FACTORS:
        best_scale, best_error = _better(x, _half(signed_max * (factor / -8)), best_scale, best_error)
    for _ in range(REFITS):
        codes = _codes(x, best_scale)
        refit = (x * codes).sum(1, keepdim=True) / codes.square().sum(1, keepdim=True).clamp_min(1)
        best_scale, best_error = _better(x, _half(refit), best_scale, best_error)
    return _codes(x, best_scale).to(torch.int8), best_scale[:, 0].to(torch.float16)


def _better(x, scale, best_scale, best_error):
    """Element by element the scale with the lesser error; earlier candidates win ties."""
    error = _error(x, scale)
    better = error < best_error
    return torch.where(better, scale, best_scale), torch.where(better, error, best_error)


def _half(scale: torch.Tensor) -> torch.Tensor:
    return scale.to(torch.float16).to(torch.float32)


def _codes(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
    return (x * inverse).round_().clamp_(-8, 7)


def _error(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Squared error ``[n, 1]`` of each block under ``scale`` ``[n, 1]``."""
    codes = _codes(x, scale)
    return (codes * scale).sub_(x).square_().sum(1, keepdim=True)
