"""Persistence diagrams and Betti curves of each layer in one figure."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_neuro import figures
from lightning_neuro.figure_panels import Array, Panel, draw_lines, draw_points, say, x_ticks, y_ticks
from lightning_neuro.figure_words import wrapped, write, write_legend
from lightning_neuro.topology.persistence import Persistence
from lightning_neuro.topology.result import TopologyResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDE, _TALL, _GAP, _LEFT, _MIDDLE, _BOTTOM = 2.55, 1.6, 0.2, 0.65, 0.42, 0.8  # inches
_GRID = 256  # distances at which the curves are drawn
_TICKS = {0.0: "0", 0.5: ".5", 1.0: "1"}


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
    width = max(_LEFT + columns * (_WIDE + _GAP), figures.CARD)
    titles = ["\n".join(_title(name, result, homology)) for name, (result, homology) in shown]
    above = 0.12 + 0.125 * max(title.count("\n") + 1 for title in titles)
    figure = figures.new_figure(width, 2 * _TALL + above + _MIDDLE + _BOTTOM)
    most = max(homology.num_points for _, (_, homology) in shown)
    boxes: list[Array] = []
    for column, ((_, (result, homology)), title) in enumerate(zip(shown, titles, strict=True)):
        left = _LEFT + column * (_WIDE + _GAP)
        diagram = Panel(left, _BOTTOM + _TALL + _MIDDLE, _WIDE, _TALL, (-0.04, 1.04), (-0.04, 1.04))
        curves = replace(diagram, bottom=_BOTTOM, y_range=(-0.04, 1.04 * float(np.log10(max(most, 10)))))
        boxes += [diagram.outline, curves.outline]
        write(figure, left, diagram.top + 0.05, title, size=7, va="bottom")
        x_ticks(figure, diagram, _TICKS)
        x_ticks(figure, curves, _TICKS)
        if why := homology.why_undefined():
            say(figure, diagram, wrapped(why, 0.9 * _WIDE))
        else:
            _draw_diagram(figure, diagram, homology, result.null.get("h1_longest_null"))
            _draw_curves(figure, curves, homology)
        if column == 0:
            _write_scales(figure, diagram, curves, most)
    draw_lines(figure, boxes)
    entries = [
        ("●", figures.OTHER, "loops"),
        ("┃", figures.VALUE, "components"),
        ("╌", figures.NULL, "longest loop of a Gaussian cloud"),
    ]
    write_legend(figure, 0.1, 0.3, entries, width)
    write(figure, width - 0.05, 0.45, figures.layers_left_out(len(found)), ha="right")
    return figure


def _draw_diagram(figure: "Figure", panel: Panel, homology: Persistence, longest: float | None) -> None:
    """Draw one diagram; `longest` is the longest lifetime of a loop in a Gaussian cloud."""

    def points(births: Any, deaths: Any) -> Array:
        inside = np.asarray(deaths) <= 1.04  # distances are scaled, and few are above 1
        return panel.points(np.asarray(births)[inside], np.asarray(deaths)[inside])

    draw_lines(figure, [panel.points([0, 1], [0, 1])], figures.FAINT)
    merged = homology.diagrams[0][:, 1] / homology.scale
    draw_points(figure, points(0 * merged, merged), "_", figures.VALUE, 6, markeredgewidth=0.5, alpha=0.5)
    loops = homology.diagrams.get(1, np.zeros((0, 2))) / homology.scale
    closed = np.isfinite(loops[:, 1])
    draw_points(figure, points(loops[closed, 0], loops[closed, 1]), ".", figures.OTHER, 3)
    end = homology.threshold / homology.scale
    if np.isfinite(end):
        draw_lines(figure, [points([0, 1], [end, end])], figures.FAINT, linestyles=":")
        draw_points(figure, points(loops[~closed, 0], np.full((~closed).sum(), end)), "^", figures.OTHER, 5)
    if longest is not None and longest < 1:
        draw_lines(figure, [points([0, 1 - longest], [longest, 1])], figures.NULL, linestyles="--")


def _draw_curves(figure: "Figure", panel: Panel, homology: Persistence) -> None:
    """Draw how many components and loops are alive at each distance, on a logarithmic scale."""
    at, curves, colors = np.linspace(0, 1, _GRID), [], []
    for dimension, color in ((0, figures.VALUE), (1, figures.OTHER)):
        if dimension in homology.diagrams:
            seen = at[at * homology.scale <= homology.threshold] if dimension else at
            alive = homology.betti_curve(dimension, seen * homology.scale)
            # The logarithm of 0 is undefined, so the curve has a gap where no bar is alive.
            curves.append(panel.points(seen, np.where(alive > 0, np.log10(np.maximum(alive, 1)), np.nan)))
            colors.append(color)
    draw_lines(figure, curves, colors, 1.2)


def _write_scales(figure: "Figure", above: Panel, below: Panel, most: int) -> None:
    """Write the vertical scales to the left of the first panels, and what the axes mean."""
    y_ticks(figure, above, _TICKS)
    y_ticks(figure, below, {power: f"{10**power:,}" for power in range(int(np.log10(max(most, 10))) + 1)})
    write(figure, 0.2, above.middle[1], "death\n(distance / scale)", size=7, ha="center", upwards=True)
    write(figure, 0.2, below.middle[1], "alive at this\ndistance", size=7, ha="center", upwards=True)
    write(figure, _LEFT, above.bottom - 0.26, "birth (distance / scale)", size=7)
    write(figure, _LEFT, below.bottom - 0.26, "distance / scale", size=7)


def _title(name: str, result: TopologyResult, homology: Persistence) -> list[str]:
    points = f"{homology.num_points:,} samples"
    lines = [wrapped(f"{figures.short_name(name)}: {points}" if name else points, _WIDE, 7)]
    if 1 in homology.diagrams:
        null = result.null.get("h1_total_null")
        lines.append(f"loops' total {homology.total(1):.2f}" + ("" if null is None else f", Gaussian {null:.2f}"))
        lines.append(f"{len(homology.diagrams[1])} loops, {homology.unfinished()} unfinished")
    return lines
