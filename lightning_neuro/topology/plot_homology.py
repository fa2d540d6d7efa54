"""Persistence diagrams and Betti curves of each layer in one figure."""

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from lightning_neuro.topology.persistence import GRID
from lightning_neuro.topology.result import TopologyResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PANELS = 8
_PIECES, _LOOPS, _NULL = "#4477aa", "#cc6677", "0.45"


def plot_homology(results: Mapping[str, TopologyResult]) -> "Figure":
    """Draw each layer's persistence diagram (above) and Betti curves (below), a column per layer (the first 8).

    Distances are divided by the layer's .9 quantile. In the diagram a red point is a loop, born at one distance and
    filled at another: the farther above the diagonal the longer it lives. Loops below the dashed line live no longer
    than the longest one in Gaussian clouds of the same covariance. Triangles on the dotted line were still alive where
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
    width, height = 2.4 * len(shown) + 0.8, 5.4
    figure = Figure(figsize=(width, height), dpi=100)
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(shown), squeeze=False)
    figure.subplots_adjust(
        left=0.55 / width, right=1 - 0.15 / width, bottom=0.75 / height, top=1 - 0.75 / height, hspace=0.28, wspace=0.12
    )
    most = max(result.homology.num_points for _, result in shown if result.homology is not None)
    for column, (name, result) in enumerate(shown):
        _draw_diagram(panels[0, column], name, result)
        _draw_curves(panels[1, column], result, most, first=column == 0)
        if column:
            panels[0, column].yaxis.set_visible(False)
    panels[0, 0].set_ylabel("death (distance / scale)", fontsize=8)
    panels[1, 0].set_ylabel("alive at that distance", fontsize=8)
    figure.text(0.5, 0.36 / height, "above: birth; below: distance; both / scale", ha="center", fontsize=8)
    more = f"; the first {len(shown)} of {len(found)} layers" if len(found) > len(shown) else ""
    words = (("● loops", _LOOPS), ("┃ pieces", _PIECES), ("╌╌ the longest loop of Gaussian clouds" + more, _NULL))
    for number, (text, colour) in enumerate(words):
        figure.text((0.1 + 0.75 * number) / width, 0.1 / height, text, color=colour, fontsize=8)
    return figure


def _draw_diagram(panel: "Axes", name: str, result: TopologyResult) -> None:
    homology = result.homology
    assert homology is not None
    panel.set_title("\n".join(_title(name, result)), fontsize=8, y=1.01)
    panel.set_xlim(-0.04, 1.02)
    panel.set_ylim(-0.04, 1.02)
    panel.set_xticks([0, 0.5, 1], ["0", ".5", "1"], fontsize=7)
    panel.set_yticks([0, 0.5, 1], ["0", ".5", "1"], fontsize=7)
    if "undefined" in homology.notes():
        panel.text(0.5, 0.5, textwrap.fill(homology.notes()["undefined"], 26), ha="center", va="center", fontsize=8)
        return
    panel.plot([0, 1], [0, 1], color="0.7", lw=0.8)
    merged = homology.diagrams[0][:, 1] / homology.scale
    panel.plot(np.zeros_like(merged), merged, "_", color=_PIECES, ms=6, mew=0.5, alpha=0.5)
    loops = homology.diagrams.get(1, np.zeros((0, 2))) / homology.scale
    finite = np.isfinite(loops[:, 1])
    panel.plot(*loops[finite].T, ".", color=_LOOPS, ms=3)
    end = homology.threshold / homology.scale
    if not finite.all():
        panel.plot(loops[~finite, 0], np.full((~finite).sum(), end), "^", color=_LOOPS, ms=5)
    if np.isfinite(end):
        panel.axhline(end, color="0.7", ls=":", lw=0.8)
    chance = result.null.get("h1_longest_null")
    if chance is not None:
        panel.plot([0, 1], [chance, 1 + chance], color=_NULL, ls="--", lw=0.8)


def _draw_curves(panel: "Axes", result: TopologyResult, most: int, *, first: bool) -> None:
    homology = result.homology
    assert homology is not None
    top = np.log10(max(most, 10))
    panel.set_xlim(0, 1)
    panel.set_ylim(-0.05, top * 1.05)
    panel.set_xticks([0, 0.5, 1], ["0", ".5", "1"], fontsize=7)
    powers = range(int(top) + 1)
    panel.set_yticks(powers, [f"{10**power:,}" for power in powers], fontsize=7)
    panel.yaxis.set_visible(first)
    if "undefined" in homology.notes():
        return
    at = np.linspace(0, 1, 4 * GRID)
    for dimension, colour in ((0, _PIECES), (1, _LOOPS)):
        if dimension in homology.diagrams:
            seen = at[at * homology.scale <= homology.threshold] if dimension else at
            alive = homology.betti_curve(dimension, seen * homology.scale)
            # Where none is alive the logarithm ends; drawn as a gap and not as one.
            panel.plot(seen, np.where(alive > 0, np.log10(np.maximum(alive, 1)), np.nan), color=colour, lw=1.2)


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
