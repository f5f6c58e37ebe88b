"""GPTQ for blocks of symmetric codes with one searched scale each.

Frantar et al. 2022 (arXiv:2210.17323): columns are rounded one after the other, and each one's rounding error is
spread over the columns not yet rounded, so that the layer's output on the calibration inputs changes least.
For a weight row w and the inputs' Hessian H = Σ x xᵀ that output error is (w − ŵ) H (w − ŵ)ᵀ. What differs here:

* blocks of neighbouring columns share a half-precision scale that may be negative, chosen when the block's turn comes,
  from the compensated weights, by the error weighted as GPTQ will spread it (1 / U_jj²);
* columns go in the order of the Hessian's diagonal ("act-order"), whole blocks first, then within a block, so that a
  block stays one block in the file;
* afterwards all scales of a row are refitted jointly by least squares in H, and codes are revisited by coordinate
  descent on the same error (as in QuantEase, Behdin et al. 2023, arXiv:2309.01885), which GPTQ's single pass leaves
  undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from kurtail_gguf.messages.errors import QuantizeError

#: Candidate scales as factors of signed maximum / −8; a negative one sends the maximum to +7 and beyond.
FACTORS: Final = (
    1.08, 1.0, 0.96, 0.92, 0.88, 0.84, 0.80, 0.76, 0.72, 0.68, 0.64,
    -1.14, -1.08, -1.02, -0.96, -0.90, -0.84, -0.78, -0.72, -0.66,
)  # fmt: skip
#: Added to the Hessian's diagonal, as a share of its mean.
DAMPING: Final = 0.01
#: Rounds of coordinate descent over the codes, each followed by a refit of the scales.
SWEEPS: Final = 2

#: Values of a weight matrix that are worked on at once (a dozen arrays of so many are alive), and those of the
#: normal equations of its scales; more rows than that wait. Models below a billion weights never do.
PART: Final = 1 << 25
#: Values of the Hessian that are brought into order at once.
_REORDERED: Final = 1 << 24

_LOWEST, _HIGHEST = -8, 7


def quantize_gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    name: str,
    block: int = 64,
    damping: float = DAMPING,
    sweeps: int = SWEEPS,
    report: Callable[[int], None] = lambda _rows: None,
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Codes and scales of a weight matrix.

    Args:
        weight: finite, floating ``[out, in]``, in a multiple of ``block``.
        hessian: ``[in, in]``, Σ x xᵀ of the inputs that the quantized model really produces; any scale.
        name: the tensor's name, for the error.
        block: columns that share a scale.
        damping: share of the mean of the Hessian's diagonal that is added to it.
        sweeps: rounds of coordinate descent after the first pass.
        report: called with the number of rows that are done, as parts of a large matrix are finished.

    Returns:
        codes int8 ``[out, in]`` in −8…7 and scales float16 ``[out, in/block]``.

    Raises:
        QuantizeError: a Hessian that is not finite, or not positive definite even with damping; a weight so large that
            its block's scale does not fit a half.
    """
    order = _Order.of(hessian, block)
    # each of these matrices is gigabytes: none may outlive its use, here or in a caller's variable
    ordered = [_reordered(hessian, order, name)]
    del hessian
    curvature = _Curvature.of(ordered.pop(), damping, name)
    rows, columns = weight.shape
    codes = np.empty((rows, columns), np.int8)
    scales = np.empty((rows, columns // block), np.float16)
    step = max(1, PART // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        codes[part], scales[part] = _quantize_rows(weight[part], curvature, order, block, sweeps)
        if not np.isfinite(scales[part]).all():
            raise QuantizeError(
                f"tensor {name}: weights up to {float(weight[part].abs().max()):.4g} need a block scale that exceeds half "
                "precision: the checkpoint is damaged"
            )
        report(min(start + step, rows))
    return codes, scales


def _quantize_rows(
    weight: torch.Tensor, curvature: _Curvature, order: _Order, block: int, sweeps: int
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Some rows of the matrix: in GPTQ they are independent of the others."""
    w, h = weight.float()[:, order.columns], curvature.hessian
    codes, scales = _first_pass(w, curvature.upper, block)
    wh = w @ h
    for _ in range(sweeps):
        scales = _refit(wh, h, codes, scales, block)
        gradient = (w - _values(codes, scales, block)) @ h
        codes = _descend(gradient, h, codes, scales, block)
    scales = _refit(wh, h, codes, scales, block)
    return _restore(codes, scales, order, block)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The loops over columns are thousands of short steps: what two threads gain there, waiting for each other loses."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True, eq=False, slots=True)
class _Order:
    """Columns in the order they are rounded: int64 ``[in]``; blocks stay together."""

    columns: torch.Tensor

    @classmethod
    def of(cls, hessian: torch.Tensor, block: int) -> _Order:
        diagonal = hessian.diagonal().double().reshape(-1, block)
        within = diagonal.argsort(dim=1, descending=True, stable=True)
        blocks = diagonal.sum(1).argsort(descending=True, stable=True)
        columns = torch.arange(diagonal.numel(), device=hessian.device).reshape(-1, block)
        return cls(columns.gather(1, within)[blocks].reshape(-1))


@dataclass(frozen=True, eq=False, slots=True)
class _Curvature:
    """The damped Hessian in the rounding order, and what GPTQ's first pass reads of it.

    Args:
        hessian: float32 ``[in, in]``.
        upper: the upper Cholesky factor of its inverse, float32 ``[in, in]``.
    """

    hessian: torch.Tensor
    upper: torch.Tensor

    @classmethod
    def of(cls, h: torch.Tensor, damping: float, name: str) -> _Curvature:
        """Factorise what :func:`_reordered` made, in place: at 28,672 inputs such a matrix takes 6.6 GB."""
        diagonal = h.diagonal()
        mean = float(diagonal.mean())
        # inputs that are always zero would leave H singular; their weights do not matter
        diagonal += damping * mean if mean > 0 else 1.0
        single = torch.empty(h.shape, device=h.device).copy_(h)
        try:
            torch.linalg.cholesky(h, out=h)
            torch.cholesky_inverse(h, out=h)
            torch.linalg.cholesky(h, upper=True, out=h)
        except torch.linalg.LinAlgError as error:
            raise QuantizeError(
                f"tensor {name}: the Hessian of its inputs is not positive definite: give more calibration tokens"
            ) from error
        return cls(single, h.float())


def _reordered(hessian: torch.Tensor, order: _Order, name: str) -> torch.Tensor:
    """The Hessian in the rounding order, float64, without another of its size on the way.

    It lies column by column, as LAPACK wants it to work in place.
    """
    size = len(hessian)
    h = torch.empty(size, size, dtype=torch.float64, device=hessian.device).mT
    step = max(1, _REORDERED // size)
    for start in range(0, size, step):
        part = hessian[order.columns[start : start + step]][:, order.columns]
        if not torch.isfinite(part).all():
            raise QuantizeError(f"tensor {name}: its inputs on the calibration text are not finite")
        h[start : start + step] = part
    return h


def _first_pass(w: torch.Tensor, upper: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """GPTQ: codes float32 ``[out, in]`` and scales float32 ``[out, in/block]``, in the rounding order."""
    w = w.clone()
    rows, columns = w.shape
    codes = torch.empty_like(w)
    scales = torch.empty(rows, columns // block, dtype=torch.float32, device=w.device)
    for number, start in enumerate(range(0, columns, block)):
        part = slice(start, start + block)
        u = upper[part, part]
        # columns first: each step then works on contiguous rows
        x = w[:, part].T.contiguous()
        scale = _search(x, 1 / u.diagonal().square())
        scales[:, number] = scale
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        errors = torch.empty_like(x)
        with _one_thread():
            for j in range(block):
                code = (x[j] * inverse).round_().clamp_(_LOWEST, _HIGHEST)
                codes[:, start + j] = code
                error = (x[j] - code * scale) / u[j, j]
                errors[j] = error
                if j + 1 < block:
                    x[j + 1 :].addr_(u[j, j + 1 :], error, alpha=-1)
        w[:, start + block :].addmm_(errors.T, upper[part, start + block :], alpha=-1)
    return codes, scales


def _search(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The best half-rounded scale ``[out]`` of blocks ``x`` float32 ``[block, out]`` under column weights ``[block]``."""
    signed_max = x.gather(0, x.abs().argmax(0, keepdim=True))[0]
    best_scale = best_error = None
    for factor in FACTORS:
        scale = _half(signed_max * (factor / -8))
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        codes = (x * inverse).round_().clamp_(_LOWEST, _HIGHEST)
        error = weights @ codes.mul_(scale).sub_(x).square_()
        if best_error is None:
            best_scale, best_error = scale, error
            continue
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return best_scale


def _refit(wh: torch.Tensor, h: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    """All scales of each row by least squares in H with the codes fixed; a row keeps its own where that is no gain.

    With q_b the codes of block b and zeros elsewhere, the scales s minimise (w − Σ s_b q_b) H (w − Σ s_b q_b)ᵀ, hence
    A s = c with A_bc = q_b H q_cᵀ and c_b = q_b H wᵀ. ``wh`` is w H.
    """
    count = wh.shape[1] // block
    step = max(1, PART // count**2)
    parts = (slice(start, start + step) for start in range(0, len(wh), step))
    return torch.cat([_refit_rows(wh[part], h, codes[part], scales[part], block) for part in parts])


def _refit_rows(
    wh: torch.Tensor, h: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, block: int
) -> torch.Tensor:
    """:func:`_refit` of so few rows that their normal equations fit into memory."""
    rows, columns = wh.shape
    count = columns // block
    normal = torch.empty(rows, count, count, dtype=torch.float64, device=wh.device)
    buffer = torch.empty_like(wh)  # one for all blocks: new pages each time take longer than the products
    for number, start in enumerate(range(0, columns, block)):
        # the matrix is symmetric: of each block's products with the others, those with later ones will do
        later = slice(start, None)
        seen = buffer.flatten()[: rows * (columns - start)].view(rows, -1)
        torch.mm(codes[:, start : start + block], h[start : start + block, later], out=seen)
        normal[:, number, number:] = normal[:, number:, number] = seen.mul_(codes[:, later]).reshape(rows, -1, block).sum(-1)
    right = (wh * codes).reshape(rows, count, block).sum(-1).double()
    # blocks of zero codes have no scale to find
    normal.diagonal(dim1=1, dim2=2).add_(1e-6 * normal.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-30)
    fitted = _half(_solve(normal, right).float())
    fitted = torch.where(torch.isfinite(fitted), fitted, scales)
    # of the error, w H wᵀ − 2 s c + s A sᵀ, what changes from one s to the other
    both, change = (fitted + scales).double(), (fitted - scales).double()
    better = ((normal @ both[..., None])[..., 0] - 2 * right).mul_(change).sum(1) < 0
    return torch.where(better[:, None], fitted, scales)


def _solve(normal: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """x of A x = c for each of symmetric A ``[rows, n, n]``, c ``[rows, n]``; NaN where A is not positive definite.

    Not torch.linalg.solve: once ``torch.set_num_threads`` was called, with MKL its LU of several matrices fails from
    about 150 columns on (torch 2.13; "Pivots given to lu_solve must all be greater or equal to 1"), or is wrong.
    """
    factor, failed = torch.linalg.cholesky_ex(normal)
    solution = torch.cholesky_solve(right[..., None], factor)[..., 0]
    return torch.where(failed[:, None] == 0, solution, torch.nan)


def _descend(gradient: torch.Tensor, h: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    """One sweep of coordinate descent: every code becomes the best one given all others.

    ``gradient`` is (w − ŵ) H, and of no use afterwards.
    """
    codes = codes.clone()
    for number, start in enumerate(range(0, h.shape[1], block)):
        part = slice(start, start + block)
        inner = h[part, part]
        scale = scales[:, number]
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        # the gradient of the block's own columns follows each step; that of later ones once the block is done
        g = gradient[:, part].T.contiguous()
        old = codes[:, part].T.contiguous()
        changes = torch.zeros_like(old)
        with _one_thread():
            for j in range(block):
                code = (old[j] + g[j] * inverse / inner[j, j]).round_().clamp_(_LOWEST, _HIGHEST)
                change = (code - old[j]) * scale
                changes[j] = change
                old[j] = code
                g.addr_(inner[:, j], change, alpha=-1)
        codes[:, part] = old.T
        later = slice(start + block, None)
        gradient[:, later].addmm_(changes.T, h[part, later], alpha=-1)
    return codes


def _values(codes: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    return (codes.reshape(len(codes), -1, block) * scales[..., None]).reshape(codes.shape)


def _restore(codes: torch.Tensor, scales: torch.Tensor, order: _Order, block: int):
    """Codes and scales in the file's column order, as numpy."""
    out = torch.empty_like(codes, dtype=torch.int8)
    out[:, order.columns] = codes.to(torch.int8)
    blocks = order.columns[::block] // block
    halves = torch.empty(scales.shape, dtype=torch.float16, device=scales.device)
    halves[:, blocks] = scales.to(torch.float16)
    return out.cpu().numpy(), halves.cpu().numpy()


def _half(scale: torch.Tensor) -> torch.Tensor:
    return scale.to(torch.float16).to(torch.float32)
