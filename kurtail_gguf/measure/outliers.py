"""How heavy the tails of activations are, before and after transforms, site by site; and a picture of it.

Two measures: kurtosis over a token's values, which KurTail (arXiv:2503.01483) learns rotations by (1.8 is
uniform, 3 normal), and the squared maximum of a block of 64, which the error of int4 with one scale a
block is proportional to. Activations are normalised (root mean square 1), so that sites compare.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kurtail_gguf.messages.errors import KurtailError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Values that share a scale (docs/format.md).
BLOCK = 64
PICTURE_SUFFIXES = (".png", ".svg")


@dataclass(frozen=True, slots=True)
class Outliers:
    """A value for each site, in the order of the forward pass.

    Args:
        kurtosis: mean over tokens of E[(x − μ)⁴]/σ⁴ over a token's values.
        block_maxima: mean over tokens and blocks of (max |x|)².
    """

    kurtosis: tuple[float, ...]
    block_maxima: tuple[float, ...]


def measure_outliers(sites: Sequence[npt.NDArray[np.floating]]) -> Outliers:
    """Measure activations ``[tokens, hidden]`` of each site; hidden is a multiple of 64, and the root mean square of a token 1."""
    pairs = [_site(np.asarray(site, np.float32)) for site in sites]
    return Outliers(tuple(kurtosis for kurtosis, _ in pairs), tuple(maxima for _, maxima in pairs))


def _site(x: npt.NDArray[np.float32]) -> tuple[float, float]:
    centred = x - x.mean(-1, keepdims=True)
    squares = np.square(centred)
    kurtosis = np.square(squares).mean(-1) / np.square(squares.mean(-1))
    maxima = np.abs(x).reshape(len(x), -1, BLOCK).max(-1)
    return float(kurtosis.mean(dtype=np.float64)), float(np.square(maxima).mean(dtype=np.float64))


def check_picture(path: Path) -> None:
    """Refuse a picture that cannot be drawn, before any work.

    Raises:
        KurtailError: an unknown ending, or no matplotlib.
    """
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise KurtailError(f"cannot draw {path}: the name must end with {' or '.join(PICTURE_SUFFIXES)}")
    check_matplotlib("a picture")


def check_matplotlib(what: str) -> None:
    """Refuse ``what`` is to be drawn where there is no matplotlib.

    Raises:
        KurtailError: it names the extra to install.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise KurtailError(f"{what} needs matplotlib: pip install 'kurtail-gguf[eval]'")


def draw(path: Path, title: str, layers: int, before: Outliers, after: Mapping[str, Outliers]) -> None:
    """Draw both measures over the layers, before and after each rotation.

    Args:
        path: a PNG or SVG file.
        title: of the picture.
        layers: the sites divide evenly among them.
        before: without rotation.
        after: by the name of a method.
    """
    check_picture(path)
    try:
        figure(title, layers, before, after).savefig(path, dpi=120)
    except OSError as error:
        raise KurtailError(f"cannot write {path}: {error.strerror}") from None


def figure(title: str, layers: int, before: Outliers, after: Mapping[str, Outliers]) -> Figure:
    """The picture itself; the arguments are those of :func:`draw`."""
    # not pyplot: a figure of its own needs no display and leaves no global state
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, MaxNLocator

    drawn = Figure(figsize=(9, 7), layout="constrained")
    upper, lower = drawn.subplots(2, 1, sharex=True)
    x = np.arange(len(before.kurtosis)) * layers / len(before.kurtosis)
    for axes, measure in ((upper, "kurtosis"), (lower, "block_maxima")):
        axes.plot(x, getattr(before, measure), color="black", linestyle=":", label="before")
        for name, outliers in after.items():
            axes.plot(x, getattr(outliers, measure), label=name)
        axes.set_yscale("log")
        # 2, 4, 10: not 2×10⁰; over half a decade some minor ticks have no room for their numbers, over 2.5 none has
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2.5, 0.5)))
        axes.grid(which="both", alpha=0.3)
    upper.axhline(1.8, color="grey", linewidth=0.8)
    upper.annotate("uniform: 1.8", (0, 1.8), color="grey", va="top", fontsize="small")
    upper.set_ylabel("mean kurtosis of a token")
    lower.set_ylabel(f"mean squared maximum of a block of {BLOCK}")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    lower.set_xlabel("layer: inputs of attention and FFN")
    upper.legend()
    drawn.suptitle(title)
    return drawn
