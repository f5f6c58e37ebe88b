"""Hadamard matrices, kurtosis and the Cayley transform against published definitions and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.method.calibration.capture import sketch_readers
from kurtail_gguf.method.fold.layer import balance_channels
from kurtail_gguf.method.rotation.cayley import cayley, optimise
from kurtail_gguf.method.rotation.hadamard import hadamard_matrix, random_orthogonal, random_rotation
from kurtail_gguf.method.rotation.learn import _some_rows, learn_r1, learn_r1_by_output_error, learn_r2
from kurtail_gguf.method.rotation.objectives import absolute_kurtosis_loss, kurtosis_loss, output_error_loss, token_kurtosis
from kurtail_gguf.numerics.hadamard import hadamard_size, sylvester, walsh_hadamard_
from kurtail_gguf.numerics.simulation.rounding import round_to

CPU = torch.device("cpu")


@pytest.mark.parametrize("n", [1, 2, 64, 512])
def test_sylvester_is_scipys_normalised(n):
    assert np.abs(sylvester(n) - scipy.linalg.hadamard(n) / np.sqrt(n)).max() < 1e-12


@pytest.mark.parametrize("n", [2, 64, 256])
def test_fast_transform_of_torch_and_numpy_is_the_matrix(n):
    x = np.random.default_rng(n).standard_normal((4, 2, 3 * n))
    expected = (x.reshape(4, 2, 3, n) @ scipy.linalg.hadamard(n) / np.sqrt(n)).reshape(x.shape)
    assert np.abs(walsh_hadamard_(x.copy(), n) - expected).max() < 1e-12
    assert np.abs(walsh_hadamard_(torch.from_numpy(x.copy()), n).numpy() - expected).max() < 1e-12


@pytest.mark.parametrize(
    ("length", "n"),
    [(1536, 512), (14336, 2048), (11008, 256), (13696, 128), (18944, 512), (4864, 256), (28672, 2048),
     (16384, 2048), (1024, 1024), (63, 1)],
)  # fmt: skip
def test_the_size_is_the_largest_power_of_two_up_to_2048(length, n):
    assert hadamard_size(length) == n


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 28, 36, 44, 60, 576, 896, 1536, 3584])
def test_known_orders_are_hadamard(n):
    h = hadamard_matrix(n)
    assert set(np.unique(h)) <= {-1.0, 1.0}
    assert np.array_equal(h @ h.T, n * np.eye(n))


@pytest.mark.parametrize("n", [3, 6, 9, 92 * 2 + 1])
def test_orders_without_a_matrix_give_none(n):
    assert hadamard_matrix(n) is None
    kind, q = random_rotation(n, np.random.default_rng(0))
    assert kind == "random"
    assert np.abs(q @ q.T - np.eye(n)).max() < 1e-12


@pytest.mark.parametrize("n", [64, 576])
def test_random_hadamard_is_orthogonal_and_seeded(n):
    kind, q = random_rotation(n, np.random.default_rng(5))
    assert kind == "hadamard"
    assert np.abs(q @ q.T - np.eye(n)).max() < 1e-12
    assert np.array_equal(q, random_rotation(n, np.random.default_rng(5))[1])
    assert not np.array_equal(q, random_rotation(n, np.random.default_rng(6))[1])


def test_random_orthogonal_has_no_preferred_sign():
    # The mean of an entry of a Haar-distributed matrix is 0; a bare QR's diagonal is biased.
    diagonals = [np.diag(random_orthogonal(8, np.random.default_rng(i))) for i in range(400)]
    assert abs(np.mean(diagonals)) < 0.03


def test_kurtosis_is_scipys():
    x = np.random.default_rng(0).standard_t(4, (7, 576))
    found = token_kurtosis(torch.from_numpy(x)).numpy()
    assert np.allclose(found, scipy.stats.kurtosis(x, axis=-1, fisher=False), rtol=1e-10)


def test_absolute_loss_is_kurtails():
    """KurTail (arXiv:2503.01483): the mean of |κ − κ_u| over tokens, κ_u = 1.8 a uniform distribution's."""
    x = np.random.default_rng(1).standard_t(5, (40, 576)) * np.linspace(0.1, 1, 576) ** 0.2
    x[:7] = np.sign(x[:7])  # flatter than uniform
    uniform = scipy.stats.uniform.stats(moments="k") + 3
    expected = np.abs(scipy.stats.kurtosis(x, axis=-1, fisher=False) - uniform).mean()
    assert float(absolute_kurtosis_loss(torch.from_numpy(x))) == pytest.approx(expected, rel=1e-10)


def test_random_hadamard_is_quarots():
    """QuaRot (arXiv:2404.00456, section 3): Q = H D, signs D at random; Haar where no H is known."""
    first, second = (random_rotation(576, np.random.default_rng(seed))[1] for seed in (0, 1))
    signs = np.sign(first * second)
    assert np.allclose(np.abs(first), 1 / 24, rtol=1e-12)
    assert np.linalg.matrix_rank(signs) == 1  # the same H, whatever the signs on one side of it
    flips = (signs[:, 0] != signs[0, 0]).mean()
    assert 0.4 < flips < 0.6
    assert np.array_equal(first * np.sign(first[:, :1]) * np.sign(hadamard_matrix(576)[:, :1]), hadamard_matrix(576) / 24)


def test_loss_vanishes_on_a_uniform_distribution():
    x = torch.linspace(-3, 3, 100_001, dtype=torch.float64)[None]
    assert kurtosis_loss(x) < 1e-4
    assert absolute_kurtosis_loss(x) < 1e-4


def test_only_the_absolute_loss_dislikes_tokens_flatter_than_uniform():
    flat = torch.tensor([[1.0, -1.0] * 32])  # κ = 1
    assert float(kurtosis_loss(flat)) == 0
    assert float(absolute_kurtosis_loss(flat)) == pytest.approx(0.8)
    peaked = torch.tensor([[1.0] + [0.0] * 63])
    assert float(kurtosis_loss(peaked)) == float(absolute_kurtosis_loss(peaked)) > 50


def test_cayley_is_orthogonal_and_identity_at_zero():
    a = torch.randn(3, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    r = cayley(a)
    assert (r @ r.mT - torch.eye(20, dtype=torch.float64)).abs().max() < 1e-12
    assert torch.equal(cayley(torch.zeros(4, 4)), torch.eye(4))


def test_cayley_of_several_large_heads(two_threads):
    a = 0.1 * torch.randn(3, 256, 256, generator=torch.Generator().manual_seed(0))
    skew = (a - a.mT).double().numpy()
    expected = np.stack([scipy.linalg.solve(np.eye(256) + s, np.eye(256) - s) for s in skew])
    np.testing.assert_allclose(cayley(a).numpy(), expected, atol=1e-5)


def test_optimise_reaches_a_known_rotation():
    rng = np.random.default_rng(0)
    target = torch.from_numpy(scipy.linalg.expm(0.1 * (lambda a: a - a.T)(rng.standard_normal((6, 6)))))
    losses = []
    found = optimise(
        torch.eye(6, dtype=torch.float64),
        lambda r, _: (r - target.float()).square().sum(),
        steps=200,
        lr=0.02,
        report=losses.append,
    )
    assert losses[-1] < 1e-4 < losses[0]
    assert (found - target).abs().max() < 0.01


def _heavy_tailed(tokens: int, n: int, seed: int) -> np.ndarray:
    """Normal tokens with three outlier channels, as a residual stream has them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, n))
    x[:, :3] *= 12
    return (x / np.sqrt((x * x).mean(-1, keepdims=True))).astype(np.float16)


def test_learned_r1_lowers_kurtosis_of_unseen_tokens_and_is_orthogonal(recorder):
    sites = [_heavy_tailed(300, 64, seed) for seed in range(4)]
    r1 = learn_r1(sites, kurtosis_loss, 0, CPU, recorder, steps=60)
    unseen = torch.from_numpy(_heavy_tailed(300, 64, 99).astype(np.float64))
    random = torch.from_numpy(random_orthogonal(64, np.random.default_rng(0)))
    assert r1.dtype == np.float64
    assert np.abs(r1 @ r1.T - np.eye(64)).max() < 1e-10
    learned_loss = kurtosis_loss(unseen @ torch.from_numpy(r1))
    assert learned_loss < 0.6 * kurtosis_loss(unseen @ random) < kurtosis_loss(unseen)
    assert recorder.stages == [["learn R1", 60, 60]]


def test_learned_r2_is_one_rotation_for_each_kv_head(recorder):
    values = [_heavy_tailed(500, 128, seed).astype(np.float32).reshape(500, 2, 64) for seed in range(3)]
    r2 = learn_r2(values, kurtosis_loss, 0, CPU, recorder, steps=40)
    assert r2.shape == (3, 2, 64, 64)
    assert np.abs(r2 @ r2.swapaxes(-1, -2) - np.eye(64)).max() < 1e-10
    assert not np.array_equal(r2[0, 0], r2[0, 1])
    for layer, seen in enumerate(values):
        for head in range(2):
            v = torch.from_numpy(seen[:, head]).double()
            assert kurtosis_loss(v @ torch.from_numpy(r2[layer, head])) < kurtosis_loss(v)
    assert recorder.stages == [["learn R2", 3, 3]]


def test_same_seed_same_bytes():
    sites = [_heavy_tailed(100, 32, seed) for seed in range(2)]
    first, second, other = (
        learn_r1(sites, kurtosis_loss, seed, CPU, NullProgress(), steps=10).tobytes() for seed in (4, 4, 5)
    )
    assert first == second != other


def test_output_error_is_that_of_rounded_inputs():
    """The loss tells rotations apart as the true error at the outputs does, rounding to 4 bits."""
    rng = np.random.default_rng(4)
    x = torch.from_numpy(_heavy_tailed(800, 128, 5).astype(np.float32))
    weight = torch.from_numpy(rng.standard_normal((300, 128)) * rng.uniform(0.1, 3, 128)).float()
    losses, errors = [], []
    for seed in range(6):
        r = torch.from_numpy(random_orthogonal(128, np.random.default_rng(seed))).float()
        r = r if seed else torch.eye(128)
        losses.append(float(output_error_loss(x @ r, weight @ r)))
        errors.append(float(((round_to(x @ r, 4, 64) - x @ r) @ (weight @ r).T).square().sum(1).mean()))
    ratios = np.array(errors) / np.array(losses)
    assert ratios.max() < 1.3 * ratios.min()
    assert losses[0] == max(losses) and errors[0] == max(errors)  # outliers unrotated are the worst


def test_readers_are_sketched_without_bias():
    rng = np.random.default_rng(6)
    weights = [torch.from_numpy(rng.standard_normal((rows, 96)) * rng.uniform(0.1, 2, 96)).float() for rows in (400, 50)]
    x = torch.from_numpy(rng.standard_normal((500, 96))).float()
    sketch, columns = sketch_readers(weights, x, torch.Generator().manual_seed(0))
    assert sketch.shape == (128 + 50, 96)
    expected = sum(w.square().sum(0) / (x @ w.T).square().sum(1).mean() for w in weights) / 2
    assert torch.allclose(columns.square(), expected, rtol=1e-4)
    found = sketch.square().sum(0)
    assert float((found.sum() / expected.sum()).log().abs()) < 0.05
    assert np.corrcoef(found.numpy(), expected.numpy())[0, 1] > 0.97


def test_r1_by_output_error_lowers_it_on_unseen_tokens(recorder):
    rng = np.random.default_rng(7)
    sites = [_heavy_tailed(300, 192, seed) for seed in range(4)]
    readers = [(rng.standard_normal((40, 192)) * rng.uniform(0.1, 3, 192)).astype(np.float32) for _ in range(4)]
    r1 = learn_r1_by_output_error(sites, readers, 0, CPU, recorder, steps=60)
    assert np.abs(r1 @ r1.T - np.eye(192)).max() < 1e-10
    start = torch.from_numpy(random_rotation(192, np.random.default_rng((0, 1)))[1])
    unseen = torch.from_numpy(_heavy_tailed(300, 192, 99).astype(np.float64))

    def loss(rotation):
        return float(sum(output_error_loss(unseen @ rotation, torch.from_numpy(a).double() @ rotation) for a in readers))

    assert loss(torch.from_numpy(r1)) < 0.9 * loss(start)
    assert recorder.stages == [["learn R1", 60, 60]]


def test_some_rows_of_a_sketch_have_the_energy_of_all():
    rng = np.random.default_rng(9)
    rows = (rng.standard_normal((40, 96)) * rng.uniform(0.1, 3, 96)).astype(np.float32)
    drawn = [_some_rows(rows, 4, rng) for _ in range(2000)]
    assert all(some.shape == (10, 96) for some in drawn)
    energy = np.mean([np.square(some).sum(0) for some in drawn], 0)
    assert np.abs(energy / np.square(rows).sum(0) - 1).max() < 0.1
    assert np.array_equal(_some_rows(rows[:3], 4, rng), rows[:3])


def test_balanced_channels_are_the_least_product():
    """s minimises (Σ m² s²)(Σ w² / s²): no other scales do better, and the bound is Cauchy and Schwarz's."""
    rng = np.random.default_rng(8)
    m, w = rng.uniform(0.1, 2, 64), rng.standard_normal((32, 64)) * rng.uniform(0.1, 2, 64)
    scale = balance_channels(torch.from_numpy(m), torch.from_numpy(np.linalg.norm(w, axis=0))).numpy()
    norms = np.linalg.norm(w, axis=0)

    def product(s):
        return (m**2 * s**2).sum() * (norms**2 / s**2).sum()

    assert product(scale) == pytest.approx((m * norms).sum() ** 2, rel=1e-9)
    assert all(product(scale * np.exp(0.1 * rng.standard_normal(64))) > product(scale) for _ in range(20))
    assert np.exp(np.log(scale).mean()) == pytest.approx(1)


def test_channels_that_are_dead_or_unread():
    w = torch.tensor([2.0, 2.0, 0.0])
    scale = balance_channels(torch.tensor([0.0, 2.0, 0.0]), w)
    assert scale.tolist() == [1.0, 1.0, 1.0]
    assert balance_channels(torch.zeros(3), w).tolist() == [1.0, 1.0, 1.0]
    # the largest channel, that nothing reads, must not be what a block is rounded for
    unread = balance_channels(torch.tensor([24.0, 0.1, 0.4]), torch.tensor([0.0, 1.0, 1.0]))
    assert 24 * unread[0] < 0.1 * 0.1 * unread[1]
    assert float(unread[1:].log().sum()) == pytest.approx(0, abs=1e-9)
    extreme = balance_channels(torch.tensor([1e-9, 1.0]), torch.ones(2))
    assert float(extreme.max() / extreme.min()) < 500
