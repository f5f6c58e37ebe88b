"""Cayley SGD against the closed forms of its papers (arXiv:2002.01113, arXiv:2405.16406) and scipy's Procrustes."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from kurtail_gguf.method.rotation.cayley_sgd import CONTRACTION, ITERATIONS, MAX_DEFECT, CayleySGD, defect, polar


def _orthogonal(n: int, seed: int) -> np.ndarray:
    return scipy.stats.ortho_group.rvs(n, random_state=seed)


def _tangent(x: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """SpinQuant's Y = Ĝ − Ĝᵀ with Ĝ = G Rᵀ − ½ R Rᵀ G Rᵀ (its equation 3)."""
    g = gradient @ x.T - 0.5 * x @ x.T @ gradient @ x.T
    return g - g.T


def _transform(y: np.ndarray, alpha: float) -> np.ndarray:
    """SpinQuant's ΔR(Y) = (I − α/2 Y)⁻¹ (I + α/2 Y) (its equation 2)."""
    eye = np.eye(len(y))
    return scipy.linalg.solve(eye - alpha / 2 * y, eye + alpha / 2 * y)


def _stepped(x: np.ndarray, gradients: list[np.ndarray], **settings) -> np.ndarray:
    parameter = torch.from_numpy(x.copy()).requires_grad_()
    optimiser = CayleySGD([parameter], **settings)
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient)
        optimiser.step()
    return parameter.detach().numpy()


@pytest.mark.parametrize("lr", [1e-3, 1.5])
def test_a_step_is_the_closed_form_cayley_transform(lr):
    x, gradient = _orthogonal(24, 0), np.random.default_rng(1).standard_normal((24, 24))
    y = -_tangent(x, gradient)  # downhill
    alpha = min(lr, 2 * CONTRACTION / (np.abs(y).sum(0).max() + 1e-8))
    assert (alpha < lr) == (lr == 1.5)  # both branches of the step size
    expected = _transform(y, alpha) @ x
    assert np.abs(_stepped(x, [gradient], lr=lr, iterations=60) - expected).max() < 1e-12
    # a few iterations: the stated bound, doubled for the polar factor taken afterwards
    found = _stepped(x, [gradient], lr=lr)
    assert np.linalg.norm(found - expected, 2) < 2 * 2 * CONTRACTION ** (ITERATIONS + 2)
    assert np.linalg.norm(found - expected, 2) < 0.01 * np.linalg.norm(expected - x, 2)


def test_momentum_lives_in_the_tangent_space():
    rng = np.random.default_rng(2)
    x, gradients = _orthogonal(10, 3), list(rng.standard_normal((3, 10, 10)))
    expected, momentum = x, np.zeros_like(x)
    for gradient in gradients:
        momentum = 0.9 * momentum - gradient
        w = _tangent(expected, momentum)
        momentum = w @ expected
        assert np.abs(expected.T @ momentum + momentum.T @ expected).max() < 1e-12
        expected = _transform(w, min(0.05, 1 / (np.abs(w).sum(0).max() + 1e-8))) @ expected
    found = _stepped(x, gradients, lr=0.05, momentum=0.9, iterations=60)
    assert np.abs(found - expected).max() < 1e-10
    without = _stepped(x, gradients, lr=0.05, momentum=0.0, iterations=60)
    assert np.abs(found - without).max() > 0.01


@pytest.mark.parametrize("dtype", MAX_DEFECT)
@pytest.mark.parametrize("iterations", [2, ITERATIONS])
def test_iterates_stay_orthogonal(dtype, iterations):
    start = np.stack([_orthogonal(16, seed) for seed in range(3)])
    parameter = torch.tensor(start, dtype=dtype, requires_grad=True)
    optimiser = CayleySGD([parameter], lr=1e9, momentum=0.9, iterations=iterations)  # only the cap bounds a step
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=dtype)
        optimiser.step()
        assert defect(parameter) <= MAX_DEFECT[dtype]
    assert np.abs(parameter.detach().numpy() - start).max() > 0.5


def test_matrices_of_a_batch_are_independent():
    rng = np.random.default_rng(4)
    x, gradient = np.stack([_orthogonal(8, 5), _orthogonal(8, 6)]), rng.standard_normal((2, 8, 8))
    gradient[1] *= 1e3
    together = _stepped(x, [gradient], lr=0.1)
    for index in range(2):
        assert np.abs(together[index] - _stepped(x[index], [gradient[index]], lr=0.1)).max() < 1e-12


def test_procrustes_reaches_the_svd_solution():
    rng = np.random.default_rng(7)
    a, b = rng.standard_normal((2, 40, 12))
    solution, _ = scipy.linalg.orthogonal_procrustes(a, b)
    start = _orthogonal(12, 8)
    start[:, 0] *= np.sign(np.linalg.det(start) * np.linalg.det(solution))  # steps keep the determinant
    parameter = torch.from_numpy(start).requires_grad_()
    a, b = torch.from_numpy(a), torch.from_numpy(b)
    steps = 600
    optimiser = CayleySGD([parameter], lr=0.03, momentum=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    for _ in range(steps):
        optimiser.zero_grad()
        (a @ parameter - b).square().sum().backward()
        optimiser.step()
        schedule.step()
    assert np.abs(parameter.detach().numpy() - solution).max() < 1e-6


def test_polar_is_scipys():
    x = _orthogonal(20, 9) + 0.01 * np.random.default_rng(10).standard_normal((20, 20))
    assert np.abs(polar(torch.from_numpy(x)).numpy() - scipy.linalg.polar(x)[0]).max() < 1e-12
    exact = torch.from_numpy(_orthogonal(20, 9))
    assert torch.equal(polar(exact), exact)


@pytest.mark.parametrize(
    ("start", "word"),
    [(torch.eye(4)[:3], "square"), (torch.eye(4, dtype=torch.float16), "float16"), (2 * torch.eye(4), "orthogonal")],
)
def test_what_cannot_be_a_rotation_is_refused(start, word):
    with pytest.raises(ValueError, match=word):
        CayleySGD([start.requires_grad_()], lr=1.0)
