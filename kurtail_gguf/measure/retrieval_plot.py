"""A picture of what was found again: a heat map of length and depth for each file and cache type."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kurtail_gguf.measure.outliers import check_picture
from kurtail_gguf.measure.retrieval import GUESS, RetrievalResult
from kurtail_gguf.messages.errors import KurtailError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Panels beside each other.
_COLUMNS = 3
#: Characters in a line of a panel's title.
_TITLE = 30


def draw_retrieval(path: Path, panels: Mapping[str, RetrievalResult]) -> None:
    """Draw results that have the same lengths and depths.

    Args:
        path: a PNG or SVG file.
        panels: results by the titles of their panels.

    Raises:
        KurtailError: another ending, no matplotlib, a path that cannot be written.
    """
    check_picture(path)
    try:
        retrieval_figure(panels).savefig(path, dpi=120)
    except OSError as error:
        raise KurtailError(f"cannot write {path}: {error.strerror}") from None


def retrieval_figure(panels: Mapping[str, RetrievalResult]) -> Figure:
    """The picture itself; the argument is that of :func:`draw_retrieval`."""
    # not pyplot: a figure of its own needs no display and leaves no global state
    from matplotlib.figure import Figure

    first = next(iter(panels.values()))
    lengths = list(dict.fromkeys(cell.length for cell in first.cells))
    depths = list(dict.fromkeys(cell.depth for cell in first.cells))
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    width = max(2.4, 0.75 * len(lengths) + 0.6)
    figure = Figure(
        figsize=(max(5.0, width * columns + 1.6), (max(1.4, 0.42 * len(depths)) + 1.0) * rows + 0.9), layout="constrained"
    )
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, result) in zip(grid.flat, panels.items(), strict=False):
        values = np.array([cell.log_likelihood for cell in result.cells]).reshape(len(lengths), len(depths)).T
        image = axes.imshow(values, vmin=GUESS, vmax=0, cmap="viridis", aspect="auto")
        for i, cell in enumerate(result.cells):
            x, y = divmod(i, len(depths))
            # viridis is dark below its middle
            colour = "white" if cell.log_likelihood < 0.4 * GUESS else "black"
            axes.text(x, y, f"{cell.right}/{cell.facts}", ha="center", va="center", color=colour)
        axes.set_title(textwrap.fill(title, _TITLE), fontsize="medium")
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{100 * depth:g} %" for depth in depths])
        # below a panel there may be none, at its left there always is one
        axes.tick_params(labelbottom=True, length=0)
    figure.supxlabel("tokens of the context", fontsize="medium")
    figure.supylabel("depth of the code", fontsize="medium")
    bar = figure.colorbar(image, ax=grid, extend="min", pad=0.02, aspect=20 * rows)
    bar.set_label(f"log-likelihood of the right code, nats\n(guessing gives −{-GUESS:.1f})")
    figure.suptitle("Codes found in a long text", fontsize="large")
    return figure
