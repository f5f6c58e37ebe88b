"""The report's plots, as SVG elements to stand in a page."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Matplotlib's description of the picture, which names places on the web.
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def by_linear(errors: Mapping[str, float], layers: int) -> dict[str, list[float]]:
    """A curve over the layers for every kind of linear; linears with the same curve share it.

    Args:
        errors: by full name, ``model.layers.N.….KIND.weight``; those of a layer's experts are averaged.
        layers: of the model.

    Returns:
        Values by kinds, joined by commas; NaN where a layer has none.
    """
    found: dict[str, list[list[float]]] = defaultdict(lambda: [[] for _ in range(layers)])
    for name, error in errors.items():
        parts = name.split(".")
        found[parts[-2]][int(parts[2])].append(error)
    curves = {kind: [float(np.mean(one)) if one else np.nan for one in found[kind]] for kind in found}
    shared: dict[str, list[str]] = defaultdict(list)
    for kind, curve in curves.items():
        shared[repr(curve)].append(kind)
    return {", ".join(kinds): curves[kinds[0]] for kinds in shared.values()}


def error_figure(what: str, curves: Mapping[str, list[float]]) -> Figure:
    """Relative errors over the layers, a line for each of :func:`by_linear`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    drawn = Figure(figsize=(9, 4), layout="constrained")
    axes = drawn.subplots()
    for name, curve in curves.items():
        axes.plot(curve, marker=".", label=name)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel(what)
    axes.grid(alpha=0.3)
    # beside the curves: seven names would hide some
    drawn.legend(loc="outside right upper")
    return drawn


def as_svg(figure: Figure, name: str) -> str:
    """The figure as an ``<svg>`` element whose text is text; all of its ids begin with ``name``."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # a page has several, and matplotlib counts from 1 in each
    for before in ('id="', 'href="#', "url(#"):
        svg = svg.replace(before, f"{before}{name}-")
    return svg
