"""Outliers of activations against scipy's kurtosis and a loop; the picture."""

from __future__ import annotations

import importlib.util
from itertools import pairwise

import numpy as np
import pytest
from scipy.linalg import hadamard
from scipy.stats import kurtosis

from kurtail_gguf.measure.outliers import Outliers, check_picture, draw, figure, measure_outliers
from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.method.fold.activations import transformed
from kurtail_gguf.method.fold.transforms import Transforms
from kurtail_gguf.method.rotation.hadamard import random_rotation

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed (extra eval)"
)


@pytest.fixture
def sites():
    """Two sites as captured: halves, one with a channel of outliers."""
    rng = np.random.default_rng(0)
    plain, heavy = rng.normal(size=(2, 40, 192))
    heavy[:, 7] *= 30
    return [x.astype(np.float16) for x in (plain, heavy)]


def test_kurtosis_is_scipys(sites):
    found = measure_outliers(sites).kurtosis
    expected = [kurtosis(x.astype(np.float64), axis=-1, fisher=False).mean() for x in sites]
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[1] > 30 > 4 > found[0]


def test_block_maxima_by_a_loop(sites):
    for site, found in zip(sites, measure_outliers(sites).block_maxima, strict=True):
        blocks = [max(abs(float(v)) for v in token[i : i + 64]) ** 2 for token in site for i in (0, 64, 128)]
        assert found == pytest.approx(np.mean(blocks), rel=1e-5)


def test_after_transforms(sites):
    """R1, a diagonal and Hadamard blocks one after the other, as plain matrices do them."""
    _, r1 = random_rotation(192, np.random.default_rng(1))
    scale = np.exp(np.random.default_rng(2).normal(size=(1, 192)))
    transforms = Transforms("random", r1=r1, scales={"ffn": scale}, online={"attention": 64, "ffn": 32})
    found = transformed(sites, ("attention", "ffn"), transforms)
    expected = [
        sites[0].astype(np.float64) @ r1 @ np.kron(np.eye(3), hadamard(64) / 8),
        (sites[1].astype(np.float64) @ r1 * scale) @ np.kron(np.eye(6), hadamard(32) / 32**0.5),
    ]
    assert len(found) == 2
    for x, y in zip(found, expected, strict=True):
        assert np.abs(x - y).max() < 1e-3
    # what rotations are for
    assert measure_outliers(found).kurtosis[1] < measure_outliers(sites).kurtosis[1] / 5
    assert transformed(sites, ("attention", "ffn"), Transforms(online={"ffn-output": 64})) is None


@needs_matplotlib
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_picture_shows_every_method(sites, tmp_path, suffix):
    path = tmp_path / f"outliers{suffix}"
    outliers = measure_outliers(sites)
    draw(path, "a title", 1, outliers, {"one+rtn": outliers, "two+rtn": outliers})
    data = path.read_bytes()
    if suffix == ".png":
        assert data.startswith(b"\x89PNG") and len(data) > 10_000
    else:
        # matplotlib draws text as outlines and names what they say in comments
        assert all(f"<!-- {name} -->".encode() in data for name in ("a title", "before", "one+rtn", "two+rtn"))


@needs_matplotlib
@pytest.mark.parametrize("largest", [2.5, 8, 60, 210, 5000])
def test_numbers_beside_the_axes_do_not_overlap(largest):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    rising = list(np.geomspace(1.8, largest, 8))
    drawn = figure("a title", 4, Outliers(rising, rising), {"one": Outliers([1.9] * 8, [2.0] * 8)})
    FigureCanvasAgg(drawn).draw()
    for axes in drawn.axes:
        low, high = axes.get_window_extent().intervaly
        boxes = [label.get_window_extent() for label in axes.get_yticklabels(which="both") if label.get_text()]
        seen = sorted((box.y0, box.y1) for box in boxes if low <= (box.y0 + box.y1) / 2 <= high)
        assert len(seen) >= 2
        assert all(below[1] <= above[0] for below, above in pairwise(seen))


def test_pictures_that_cannot_be_drawn_are_refused_at_once(tmp_path, monkeypatch):
    with pytest.raises(KurtailError, match=r"must end with .png or .svg"):
        check_picture(tmp_path / "x.gif")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KurtailError, match=r"pip install 'kurtail-gguf\[eval\]'"):
        check_picture(tmp_path / "x.png")
