"""Persistence diagrams and Betti curves of each layer in one figure."""

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_neuro import figures
from lightning_neuro.topology.persistence import Persistence
from lightning_neuro.topology.result import TopologyResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL, _GAP, _LEFT, _TOP, _MIDDLE, _BOTTOM = 2.1, 0.25, 0.6, 0.7, 0.5, 0.75  # inches
_GRID = 256  # distances at which the curves are drawn


def plot_homology(results: Mapping[str, TopologyResult]) -> "Figure":
    """Draw each layer's persistence diagram (above) and Betti curves (below), one column per layer (the first 8).

    Distances are divided by the layer's .9 quantile. In the diagram an orange point is a loop that is born at one
    distance and filled at another: the farther above the diagonal, the longer it lives. Loops below the dashed line
    live no longer than the longest one in a Gaussian cloud of the same covariance. Triangles on the dotted line were
    still alive where the search ended. The blue marks at the left edge are the distances at which connected components
    merge. The curves count the components (blue) and loops (orange) alive at each distance, on a logarithmic scale: if
    the blue one falls late, there are groups far apart from each other.

    Args:
        results: Layer name -> result with homology; an empty name is not shown.

    Returns:
        A matplotlib figure that is not registered with pyplot, so it need not be closed.

    Raises:
        ValueError: If no result holds homology.

    Example:
        >>> import torch
        >>> from lightning_neuro.topology import ActivationShape
        >>> metric = ActivationShape(mapper=False)
        >>> metric.update(torch.randn(60, 4))
        >>> figure = plot_homology({"fc1": metric.compute()})
    """
    found = {name: (result, result.homology) for name, result in results.items() if result.homology is not None}
    shown, _, columns = figures.first_panels(found, max_columns=figures.MAX_PANELS)
    figure = figures.new_figure(_LEFT + columns * (_PANEL + _GAP), 2 * _PANEL + _TOP + _MIDDLE + _BOTTOM)
    axes = figures.inch_axes(figure)
    most = max(homology.num_points for _, (_, homology) in shown)
    for column, (name, (result, homology)) in enumerate(shown):
        left = _LEFT + column * (_PANEL + _GAP)
        above = _BOTTOM + _PANEL + _MIDDLE
        title = "\n".join(_title(name, result, homology))
        axes.text(left, above + _PANEL + 0.06, title, fontsize=8, va="bottom", linespacing=1.3)
        _draw_diagram(axes, (left, above), homology, result.null.get("h1_longest_null"))
        _draw_curves(axes, (left, _BOTTOM), homology, most)
    _label(axes, most, figures.layers_left_out(len(found)))
    return figure


def _draw_diagram(axes: "Axes", corner: tuple[float, float], homology: Persistence, longest: float | None) -> None:
    """Draw one diagram; `longest` is the longest lifetime of a loop in a Gaussian cloud."""
    left, bottom = corner
    _box(axes, corner)
    if why := homology.why_undefined():
        axes.text(left + _PANEL / 2, bottom + _PANEL / 2, textwrap.fill(why, 26), ha="center", va="center", fontsize=8)
        return

    def draw(births: Any, deaths: Any, style: str = "", **options: Any) -> None:
        inside = np.asarray(deaths) <= 1.04  # distances are scaled, and few are above 1
        births, deaths = np.asarray(births)[inside], np.asarray(deaths)[inside]
        axes.plot(left + (0.04 + births * 0.92) * _PANEL, bottom + (0.04 + deaths * 0.92) * _PANEL, style, **options)

    draw([0, 1], [0, 1], color=figures.FAINT, lw=0.8)
    merged = homology.diagrams[0][:, 1] / homology.scale
    draw(np.zeros_like(merged), merged, "_", color=figures.VALUE, ms=6, mew=0.5, alpha=0.5)
    loops = homology.diagrams.get(1, np.zeros((0, 2))) / homology.scale
    closed = np.isfinite(loops[:, 1])
    draw(loops[closed, 0], loops[closed, 1], ".", color=figures.OTHER, ms=3)
    end = homology.threshold / homology.scale
    if np.isfinite(end):
        draw([0, 1], [end, end], ":", color=figures.FAINT, lw=0.8)
        draw(loops[~closed, 0], np.full((~closed).sum(), end), "^", color=figures.OTHER, ms=5)
    if longest is not None and longest < 1:
        draw([0, 1 - longest], [longest, 1], "--", color=figures.NULL, lw=0.8)


def _draw_curves(axes: "Axes", corner: tuple[float, float], homology: Persistence, most: int) -> None:
    left, bottom = corner
    _box(axes, corner)
    if homology.why_undefined():
        return
    at = np.linspace(0, 1, _GRID)
    for dimension, colour in ((0, figures.VALUE), (1, figures.OTHER)):
        if dimension in homology.diagrams:
            seen = at[at * homology.scale <= homology.threshold] if dimension else at
            alive = homology.betti_curve(dimension, seen * homology.scale)
            # The logarithm of 0 is undefined, so the curve has a gap where no bar is alive.
            height = np.where(alive > 0, _logarithmic(np.maximum(alive, 1), most), np.nan)
            axes.plot(left + (0.04 + seen * 0.92) * _PANEL, bottom + height, color=colour, lw=1.2)


def _logarithmic(count: Any, most: int) -> Any:
    """Height of a count above the lower edge of its panel, in inches."""
    return (0.04 + 0.92 * np.log10(count) / np.log10(max(most, 10))) * _PANEL


def _box(axes: "Axes", corner: tuple[float, float]) -> None:
    edge = np.array([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)]) * _PANEL + corner
    axes.plot(*edge.T, color=figures.INK, lw=0.8)
    for at, word in ((0, "0"), (0.5, ".5"), (1, "1")):
        x = corner[0] + (0.04 + 0.92 * at) * _PANEL
        axes.text(x, corner[1] - 0.06, word, fontsize=7, ha="center", va="top")


def _label(axes: "Axes", most: int, left_out: str) -> None:
    """The vertical scales, to the left of the first panel, and the meaning of the colours."""
    above = _BOTTOM + _PANEL + _MIDDLE
    for at, word in ((0, "0"), (0.5, ".5"), (1, "1")):
        axes.text(_LEFT - 0.06, above + (0.04 + 0.92 * at) * _PANEL, word, fontsize=7, ha="right", va="center")
    for power in range(int(np.log10(max(most, 10))) + 1):
        height = _BOTTOM + float(_logarithmic(10**power, most))
        axes.text(_LEFT - 0.06, height, f"{10**power:,}", fontsize=7, ha="right", va="center")
    middle = _PANEL / 2
    axes.text(0.12, above + middle, "death (distance / scale)", fontsize=8, rotation=90, ha="center", va="center")
    axes.text(0.12, _BOTTOM + middle, "alive at this distance", fontsize=8, rotation=90, ha="center", va="center")
    axes.text(_LEFT, above - 0.3, "birth (distance / scale)", fontsize=8, va="center")
    axes.text(_LEFT, _BOTTOM - 0.3, "distance / scale", fontsize=8, va="center")
    axes.text(_LEFT, 0.12, "● loops", color=figures.OTHER, fontsize=8)
    axes.text(_LEFT + 0.7, 0.12, "┃ components", color=figures.VALUE, fontsize=8)
    last = "; ".join(filter(None, ["╌╌ longest loop of a Gaussian cloud", left_out]))
    axes.text(_LEFT + 1.75, 0.12, last, color=figures.NULL, fontsize=8)


def _title(name: str, result: TopologyResult, homology: Persistence) -> list[str]:
    points = f"{homology.num_points:,} samples"
    lines = [f"{figures.short_name(name)}: {points}" if name else points]
    if 1 in homology.diagrams:
        null = result.null.get("h1_total_null")
        lines.append(f"loops' total {homology.total(1):.2f}" + ("" if null is None else f", Gaussian {null:.2f}"))
        lines.append(f"{len(homology.diagrams[1])} loops, {homology.unfinished()} unfinished")
    return lines
