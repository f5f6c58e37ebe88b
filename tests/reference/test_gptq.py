"""GPTQ against the recursion it is a fast form of, and its refinements against what they minimise."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kurtail_gguf.messages.errors import QuantizeError
from kurtail_gguf.method.quantize import gptq
from kurtail_gguf.method.quantize.gptq import quantize_gptq
from kurtail_gguf.method.quantize.rtn import quantize_rtn
from kurtail_gguf.numerics.formats import kt4


def _problem(seed: int, rows: int = 24, columns: int = 128, tokens: int = 600) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and the Hessian of correlated inputs with a few strong channels."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((columns, columns)) / columns**0.5 + np.diag(rng.uniform(0.1, 3, columns))
    x = rng.standard_normal((tokens, columns)) @ mixing
    return torch.from_numpy(rng.standard_normal((rows, columns))).float(), torch.from_numpy(x.T @ x).float()


def _values(codes: np.ndarray, scales: np.ndarray, block: int = 64) -> torch.Tensor:
    expanded = np.repeat(scales.astype(np.float32), block, axis=1)
    return torch.from_numpy(codes.astype(np.float32) * expanded)


def _output_error(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr((W − Ŵ) H (W − Ŵ)ᵀ) / tr(W H Wᵀ): relative squared error of the layer's output."""
    w, h = weight.double(), hessian.double()
    difference = w - quantized.double()
    return float(((difference @ h) * difference).sum() / ((w @ h) * w).sum())


def _obq(w: np.ndarray, h: np.ndarray, scales: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Optimal brain quantization in a fixed order (Frantar and Alistarh 2022, arXiv:2208.11580, equation 3).

    Each weight is rounded, the rest move by −(w_q − quant(w_q)) / [H_F⁻¹]_qq · (H_F⁻¹)_{:,q}, and q leaves F.
    """
    w = w.astype(np.float64).copy()
    codes = np.zeros_like(w)
    inverse = np.linalg.inv(h.astype(np.float64))
    for q in order:
        scale = scales[:, q // 64]
        codes[:, q] = np.clip(np.rint(w[:, q] / scale), -8, 7)
        error = (w[:, q] - codes[:, q] * scale) / inverse[q, q]
        w -= np.outer(error, inverse[q])
        inverse -= np.outer(inverse[:, q], inverse[q]) / inverse[q, q]
        inverse[q, q] = 1.0  # out of F: never looked at again
    return codes


@pytest.mark.parametrize("seed", range(3))
def test_the_first_pass_is_optimal_brain_quantization(seed):
    w, h = _problem(seed)
    codes, scales = quantize_gptq(w, h, "w", sweeps=0)
    damped = h.numpy() + gptq.DAMPING * h.diagonal().mean().item() * np.eye(len(h))
    diagonal = h.diagonal().numpy()
    blocks = sorted(range(2), key=lambda b: -diagonal[64 * b : 64 * b + 64].sum())
    order = [64 * b + j for b in blocks for j in np.argsort(-diagonal[64 * b : 64 * b + 64], kind="stable")]
    # the refit that closes the quantization changes scales, not codes: those that the codes were chosen by are needed
    first, chosen = _scales_of_first_pass(w, torch.from_numpy(damped), order)
    expected = _obq(w.numpy(), damped, chosen, np.array(order))
    assert np.array_equal(codes, first)
    # float32 against float64: a code may fall on the other side of a tie
    assert (codes != expected).mean() < 2e-3
    assert np.isfinite(scales).all()


def _scales_of_first_pass(w, damped, order):
    columns = torch.tensor(order)
    h = damped.double()[columns][:, columns]
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True).float()
    codes, scales = gptq._first_pass(w[:, columns], upper, 64)
    out, chosen = torch.empty_like(codes), torch.empty_like(scales)
    out[:, columns] = codes
    chosen[:, columns[::64] // 64] = scales
    return out.to(torch.int8).numpy(), chosen.double().numpy()


@pytest.mark.parametrize("seed", range(3))
def test_much_better_than_rounding_and_every_sweep_helps(seed):
    w, h = _problem(seed, rows=64, columns=256)
    errors = [_output_error(w, torch.from_numpy(kt4.dequantize(*quantize_rtn(w, "w"))), h)]
    for sweeps in (0, 1, 2, 4):
        errors.append(_output_error(w, _values(*quantize_gptq(w, h, "w", sweeps=sweeps)), h))
    assert errors[1] < 0.7 * errors[0]
    assert all(after <= before * (1 + 1e-3) for before, after in zip(errors[1:], errors[2:], strict=False))
    assert errors[3] < 0.95 * errors[1]


def test_without_correlations_every_block_is_searched_by_itself():
    """A diagonal Hessian leaves nothing to compensate, so the search of many scales beats the activations' of few."""
    w, _ = _problem(0)
    codes, scales = quantize_gptq(w, torch.eye(128), "w")
    found = (_values(codes, scales) - w).square().reshape(-1, 64).sum(1)
    plain = torch.from_numpy(kt4.dequantize(*kt4.quantize_reference(w.numpy())))
    assert found.sum() < (plain - w).square().sum()
    step = np.repeat(scales.astype(np.float32), 64, axis=1)
    nearest = np.clip(np.rint(w.numpy() / step), -8, 7)
    assert np.abs(codes - nearest).max() <= 1  # the last refit moved the scale under fixed codes
    assert (codes != nearest).mean() < 0.02


def test_scales_are_fitted_jointly():
    """With the codes of one row fixed, numpy's least squares in H finds the same scales."""
    w, h = _problem(1, rows=3)
    codes, scales = quantize_gptq(w, h, "w", damping=1e-4)
    root = np.linalg.cholesky(h.double().numpy() + 1e-4 * float(h.diagonal().mean()) * np.eye(128)).T
    for row in range(3):
        basis = np.zeros((128, 2))
        basis[:64, 0], basis[64:, 1] = codes[row, :64], codes[row, 64:]
        best = np.linalg.lstsq(root @ basis, root @ w[row].double().numpy(), rcond=None)[0]
        assert scales[row].astype(np.float64) == pytest.approx(best, rel=2e-3)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([32, 64]), st.integers(1, 3))
def test_results_are_representable_for_any_input(seed, block, blocks):
    rng = np.random.default_rng(seed)
    columns = 64 * blocks
    x = rng.standard_normal((rng.integers(1, 200), columns)) * rng.choice([0, 1e-6, 1, 1e4], columns)
    w = torch.from_numpy(rng.standard_t(2, (5, columns)) * rng.choice([0, 1e-8, 1, 100], (5, 1))).float()
    codes, scales = quantize_gptq(w, torch.from_numpy(x.T @ x).float(), "w", block)
    assert codes.shape == w.shape and scales.shape == (5, columns // block)
    assert codes.min() >= -8 and codes.max() <= 7
    assert np.isfinite(scales).all()
    zero = (w == 0).all(1).numpy()
    assert (_values(codes, scales, block).numpy()[zero] == 0).all()


def test_the_order_of_columns_is_put_back():
    w, h = _problem(2)
    shuffle = torch.randperm(128, generator=torch.Generator().manual_seed(0)).reshape(2, 64)
    shuffle = torch.cat([shuffle.sort(1)[0][1], shuffle.sort(1)[0][0]])
    moved = quantize_gptq(w[:, shuffle], h[shuffle][:, shuffle], "w")
    error = _output_error(w[:, shuffle], _values(*moved), h[shuffle][:, shuffle])
    assert error < 0.6 * _output_error(w, torch.from_numpy(kt4.dequantize(*quantize_rtn(w, "w"))), h)


def test_inputs_that_are_not_finite_are_named():
    w, h = _problem(0)
    h[3, 3] = torch.nan
    with pytest.raises(QuantizeError, match="tensor blk: its inputs on the calibration text are not finite"):
        quantize_gptq(w, h, "blk")


def test_weights_beyond_a_half_are_named():
    w, h = _problem(0)
    w[3, 70] = 3e38
    with pytest.raises(QuantizeError, match=r"tensor blk: weights up to 3e\+38 need a block scale that exceeds half precision"):
        quantize_gptq(w, h, "blk")


def test_rows_in_parts_are_rows_at_once(monkeypatch):
    """Memory is bounded by working on parts of the rows; no row notices."""
    w, h = _problem(3, rows=40)
    expected = quantize_gptq(w, h, "w")
    monkeypatch.setattr(gptq, "PART", 7 * 128)
    monkeypatch.setattr(gptq, "_REORDERED", 5 * 128)
    done = []
    found = quantize_gptq(w, h, "w", report=done.append)
    assert done == [7, 14, 21, 28, 35, 40]
    # products of fewer rows may sum in another order: a tie may fall on the other side
    assert (found[0] != expected[0]).mean() < 1e-3
    assert np.allclose(found[1].astype(np.float32), expected[1].astype(np.float32), rtol=2e-3)


def test_the_hessian_is_let_go_before_it_is_factorised(monkeypatch):
    """At 28,672 inputs it has 3.3 GB, when more is in use than at any other time."""
    w, h = _problem(0)
    made, alive = [], []

    def hessian() -> torch.Tensor:
        own = h.clone()
        made.append(weakref.ref(own))
        return own

    factorise = gptq._Curvature.of

    def of(*arguments):
        alive.append(made[0]())
        return factorise(*arguments)

    monkeypatch.setattr(gptq._Curvature, "of", of)
    quantize_gptq(w, hessian(), "w")
    assert alive == [None]


def test_scales_of_many_blocks_are_the_least_squares_solution(two_threads):
    # 224 as of 14,336 inputs (Llama-3-8B's down_proj), in smaller blocks: LU of several such matrices fails there
    w, h = _problem(11, rows=6, columns=4 * 224, tokens=4000)
    codes, scales = quantize_gptq(w, h, "w", block=4, sweeps=0)
    damped = h.double().numpy() + gptq.DAMPING * h.diagonal().mean().item() * np.eye(len(h))
    for row, q, s in zip(w.double().numpy(), codes, scales, strict=True):
        blocks = np.kron(np.eye(224), np.ones((4, 1))) * q[:, None]
        expected = np.linalg.solve(blocks.T @ damped @ blocks, blocks.T @ damped @ row)
        assert s == pytest.approx(expected, rel=2e-3, abs=1e-3 * np.abs(expected).max())
