"""Persistence diagrams and Betti curves of each layer in one figure."""

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_neuro.topology.persistence import GRID
from lightning_neuro.topology.result import TopologyResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PANELS = 8
_PANEL, _GAP, _LEFT, _TOP, _MIDDLE, _BOTTOM = 2.1, 0.25, 0.6, 0.7, 0.5, 0.75  # inches
_PIECES, _LOOPS, _NULL = "#4477aa", "#cc6677", "0.45"


def plot_homology(results: Mapping[str, TopologyResult]) -> "Figure":
    """Draw each layer's persistence diagram (above) and Betti curves (below), a column per layer (the first 8).

    Distances are divided by the layer's .9 quantile. In the diagram a red point is a loop, born at one distance and
    filled at another: the farther above the diagonal the longer it lives. Loops below the dashed line live no longer
    than the longest one in a Gaussian cloud of the same covariance. Triangles on the dotted line were still alive where
    the search ended. The blue marks at the left edge are pieces that merge. The curves count the pieces (blue) and
    loops (red) alive at each distance, on a logarithmic scale: a late fall of the blue one means groups far apart.

    Args:
        results: Layer name -> result with homology; an empty name is not written.

    Returns:
        A matplotlib figure not known to pyplot, so there is nothing to close.

    Raises:
        ValueError: If no result holds homology.

    Example:
        >>> import torch
        >>> from lightning_neuro.topology import ActivationShape
        >>> metric = ActivationShape(mapper=False)
        >>> metric.update(torch.randn(60, 4, generator=torch.Generator().manual_seed(0)))
        >>> figure = plot_homology({"fc1": metric.compute()})
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = {name: result for name, result in results.items() if result.homology is not None}
    if not found:
        raise ValueError("results must hold at least one layer's homology, but there is none.")
    shown = list(found.items())[:MAX_PANELS]
    width, height = _LEFT + len(shown) * (_PANEL + _GAP), 2 * _PANEL + _TOP + _MIDDLE + _BOTTOM
    figure = Figure(figsize=(width, height), dpi=100)
    FigureCanvasAgg(figure)
    # One axes in inches holds all panels: an axes of its own for each would take four times as long to draw.
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height), autoscale_on=False)
    axes.set_axis_off()
    most = max(result.homology.num_points for _, result in shown if result.homology is not None)
    for column, (name, result) in enumerate(shown):
        left = _LEFT + column * (_PANEL + _GAP)
        _draw_diagram(axes, (left, _BOTTOM + _PANEL + _MIDDLE), name, result)
        _draw_curves(axes, (left, _BOTTOM), result, most)
    _label(axes, width, most, len(found) - len(shown))
    return figure


def _draw_diagram(axes: "Axes", corner: tuple[float, float], name: str, result: TopologyResult) -> None:
    homology = result.homology
    assert homology is not None
    left, bottom = corner
    _box(axes, corner)
    axes.text(left, bottom + _PANEL + 0.06, "\n".join(_title(name, result)), fontsize=8, va="bottom", linespacing=1.3)
    if "undefined" in homology.notes():
        why = textwrap.fill(homology.notes()["undefined"], 26)
        axes.text(left + _PANEL / 2, bottom + _PANEL / 2, why, ha="center", va="center", fontsize=8)
        return

    def draw(births: Any, deaths: Any, style: str = "", **options: Any) -> None:
        inside = np.asarray(deaths) <= 1.04  # distances are scaled, and few are above 1
        births, deaths = np.asarray(births)[inside], np.asarray(deaths)[inside]
        axes.plot(left + (0.04 + births * 0.92) * _PANEL, bottom + (0.04 + deaths * 0.92) * _PANEL, style, **options)

    draw([0, 1], [0, 1], color="0.7", lw=0.8)
    merged = homology.diagrams[0][:, 1] / homology.scale
    draw(np.zeros_like(merged), merged, "_", color=_PIECES, ms=6, mew=0.5, alpha=0.5)
    loops = homology.diagrams.get(1, np.zeros((0, 2))) / homology.scale
    closed = np.isfinite(loops[:, 1])
    draw(loops[closed, 0], loops[closed, 1], ".", color=_LOOPS, ms=3)
    end = homology.threshold / homology.scale
    if np.isfinite(end):
        draw([0, 1], [end, end], ":", color="0.7", lw=0.8)
        draw(loops[~closed, 0], np.full((~closed).sum(), end), "^", color=_LOOPS, ms=5)
    chance = result.null.get("h1_longest_null")
    if chance is not None and chance < 1:
        draw([0, 1 - chance], [chance, 1], "--", color=_NULL, lw=0.8)


def _draw_curves(axes: "Axes", corner: tuple[float, float], result: TopologyResult, most: int) -> None:
    homology = result.homology
    assert homology is not None
    left, bottom = corner
    _box(axes, corner)
    if "undefined" in homology.notes():
        return
    at = np.linspace(0, 1, 4 * GRID)
    for dimension, colour in ((0, _PIECES), (1, _LOOPS)):
        if dimension in homology.diagrams:
            seen = at[at * homology.scale <= homology.threshold] if dimension else at
            alive = homology.betti_curve(dimension, seen * homology.scale)
            # Where none is alive the logarithm ends; drawn as a gap and not as one.
            height = np.where(alive > 0, _logarithmic(np.maximum(alive, 1), most), np.nan)
            axes.plot(left + (0.04 + seen * 0.92) * _PANEL, bottom + height, color=colour, lw=1.2)


def _logarithmic(count: Any, most: int) -> Any:
    """How many inches above the lower edge of its panel a count is drawn."""
    return (0.04 + 0.92 * np.log10(count) / np.log10(max(most, 10))) * _PANEL


def _box(axes: "Axes", corner: tuple[float, float]) -> None:
    edge = np.array([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)]) * _PANEL + corner
    axes.plot(*edge.T, color="0.3", lw=0.8)
    for at, word in ((0, "0"), (0.5, ".5"), (1, "1")):
        x = corner[0] + (0.04 + 0.92 * at) * _PANEL
        axes.text(x, corner[1] - 0.06, word, fontsize=7, ha="center", va="top")


def _label(axes: "Axes", width: float, most: int, left_out: int) -> None:
    """What the panels share: the vertical scales, in front of the first, and the meaning of the colours."""
    above = _BOTTOM + _PANEL + _MIDDLE
    for at, word in ((0, "0"), (0.5, ".5"), (1, "1")):
        axes.text(_LEFT - 0.06, above + (0.04 + 0.92 * at) * _PANEL, word, fontsize=7, ha="right", va="center")
    for power in range(int(np.log10(max(most, 10))) + 1):
        height = _BOTTOM + float(_logarithmic(10**power, most))
        axes.text(_LEFT - 0.06, height, f"{10**power:,}", fontsize=7, ha="right", va="center")
    middle = _PANEL / 2
    axes.text(0.12, above + middle, "death (distance / scale)", fontsize=8, rotation=90, ha="center", va="center")
    axes.text(0.12, _BOTTOM + middle, "alive at that distance", fontsize=8, rotation=90, ha="center", va="center")
    axes.text(_LEFT, above - 0.3, "birth (distance / scale)", fontsize=8, va="center")
    axes.text(_LEFT, _BOTTOM - 0.3, "distance / scale", fontsize=8, va="center")
    more = f"; {left_out} more layers are not drawn" if left_out else ""
    words = [("● loops", _LOOPS), ("┃ pieces", _PIECES), ("╌╌ longest loop of a Gaussian cloud" + more, _NULL)]
    for number, (text, colour) in enumerate(words):
        axes.text(_LEFT + 0.75 * number, 0.12, text, color=colour, fontsize=8)


def _title(name: str, result: TopologyResult) -> list[str]:
    homology = result.homology
    assert homology is not None
    points = f"{homology.num_points:,} samples"
    lines = [f"{name}: {points}" if name else points]
    if 1 in homology.diagrams:
        open_ends = homology.unfinished()
        chance = result.null.get("h1_total_null")
        beside = "" if chance is None else f", Gaussian {chance:.2f}"
        lines.append(f"loops' total {homology.total(1):.2f}{beside}")
        lines.append(f"{len(homology.diagrams[1])} loops, {open_ends} unfinished")
    return lines
