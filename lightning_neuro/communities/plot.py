"""Figure of the reordered graph with its communities, one panel per layer."""

import math
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lightning_neuro.communities.result import CommunityResult
from lightning_neuro.figures import (
    INK,
    MAX_PANELS,
    OUTLINE,
    SEQUENTIAL,
    first_panels,
    inch_axes,
    layers_left_out,
    new_figure,
    short_name,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PIXELS = 256
_PANEL = 3.3  # inches
_TOP, _BOTTOM, _SIDE, _GAP, _BAR = 0.7, 0.42, 0.25, 0.25, 0.75
_LEAST_DARKEST = 0.05  # each panel has its own scale, but weights below this are not amplified to look like structure

Image = npt.NDArray[np.float32]


def plot_communities(results: Mapping[str, CommunityResult]) -> "Figure":
    """Draw each layer's graph as a matrix whose units are sorted by community.

    A dark cell is a pair of units that are active together. Communities are outlined squares along the diagonal, the
    largest first. Dark squares on a light background are clear groups; if the squares are hardly darker than the rest,
    there are no groups, whatever the modularity. The title compares the modularity with that of shuffled activations.

    Large layers are averaged down to 256 x 256 cells, and at most 8 layers are drawn, to limit the cost.

    Args:
        results: Layer name -> result; an empty name is not shown.

    Returns:
        A matplotlib figure that is not registered with pyplot.

    Raises:
        ValueError: If there is no result.

    Example:
        >>> import torch
        >>> from lightning_neuro.communities import NeuronModularity
        >>> metric = NeuronModularity()
        >>> metric.update(torch.randn(50, 6, generator=torch.Generator().manual_seed(0)))
        >>> figure = plot_communities({"fc1": metric.compute()})
    """
    shown, rows, columns = first_panels(results, max_columns=math.ceil(math.sqrt(min(len(results), MAX_PANELS))))
    images = [_sorted_image(result) if result.defined else None for _, result in shown]
    width = _SIDE + columns * (_PANEL + _GAP) + _BAR
    height = rows * (_TOP + _PANEL) + _BOTTOM
    figure = new_figure(width, height)
    axes = inch_axes(figure)
    for panel, ((name, result), image) in enumerate(zip(shown, images, strict=True)):
        row, column = divmod(panel, columns)
        left, bottom = _SIDE + column * (_PANEL + _GAP), height - (row + 1) * (_TOP + _PANEL)
        _draw_panel(axes, left, bottom, image, name, result)
    if any(image is not None for image in images):
        _draw_scale(axes, width - _BAR, _BOTTOM, _weight_in_words(shown[0][1].weight))
    foot = "Units sorted by community (outlined). Q: modularity; by chance: mean Q of shuffled activations."
    foot = ". ".join(part for part in (foot.rstrip("."), layers_left_out(len(results))) if part)
    axes.text(_SIDE, 0.06, textwrap.fill(foot, int(15 * width)), fontsize=7, color=INK, va="bottom")
    return figure


def _draw_panel(
    axes: "Axes", left: float, bottom: float, image: Image | None, name: str, result: CommunityResult
) -> None:
    from matplotlib.collections import LineCollection

    lines = _title(short_name(name, 40), result)
    starts, ends = np.zeros(0), np.zeros(0)
    if image is None:
        sentence = textwrap.fill(result.notes()["undefined"], 40)
        axes.text(left + _PANEL / 2, bottom + _PANEL / 2, sentence, fontsize=9, ha="center", va="center")
    else:
        darkest = max(float(np.quantile(image, 0.995)), _LEAST_DARKEST)
        lines[-1] += f"; darkest blue: {darkest:.2f} or more"
        _show(axes, image / darkest, (left, left + _PANEL, bottom, bottom + _PANEL))
        k = len(result.units)
        ends = np.cumsum(np.bincount(result.labels.numpy()))
        starts = np.concatenate([[0], ends[:-1]])
        visible = ends - starts > max(1, k / MAX_PIXELS)
        starts, ends = starts[visible] * (_PANEL / k), ends[visible] * (_PANEL / k)
    axes.text(left, bottom + _PANEL + 0.06, "\n".join(lines), fontsize=8, va="bottom", linespacing=1.35)

    def square(a: float, b: float) -> list[tuple[float, float]]:
        top = bottom + _PANEL
        return [(left + x, top - y) for x, y in ((a, a), (b, a), (b, b), (a, b), (a, a))]

    squares = [square(a, b) for a, b in zip(starts, ends, strict=True)]
    colors = [INK, *[OUTLINE] * len(squares)]
    axes.add_collection(LineCollection([square(0, _PANEL), *squares], colors=colors, linewidths=1.0), autolim=False)


def _draw_scale(axes: "Axes", left: float, bottom: float, meaning: str) -> None:
    _show(axes, np.linspace(1, 0, 64, dtype=np.float32)[:, None], (left, left + 0.13, bottom, bottom + _PANEL))
    axes.text(left + 0.17, bottom, "0", fontsize=7, va="bottom")
    axes.text(left + 0.17, bottom + _PANEL, "darkest", fontsize=7, va="top")
    axes.text(left + 0.2, bottom + 0.25, f"edge weight = {meaning}", fontsize=7, rotation=90, va="bottom")


def _show(axes: "Axes", image: Image, extent: tuple[float, float, float, float]) -> None:
    axes.imshow(image, cmap=SEQUENTIAL, vmin=0.0, vmax=1.0, extent=extent, interpolation="nearest", aspect="auto")


def _sorted_image(result: CommunityResult) -> Image:
    """The adjacency, sorted by community and, inside one, by strength; averaged down if large."""
    labels, adjacency = result.labels.numpy(), result.adjacency.float().numpy()
    order = np.lexsort((-adjacency.sum(axis=1), labels))
    image: Image = adjacency[np.ix_(order, order)]
    block = -(-len(image) // MAX_PIXELS)
    if block == 1:
        return image
    starts = np.arange(0, len(image), block)
    sizes = np.diff(np.append(starts, len(image))).astype(np.float32)
    summed = np.add.reduceat(np.add.reduceat(image, starts, axis=0), starts, axis=1)
    averaged: Image = (summed / np.outer(sizes, sizes)).astype(np.float32)
    return averaged


def _title(name: str, result: CommunityResult) -> list[str]:
    size = f"{len(result.units):,} units, {result.num_samples:,} samples"
    lines = [f"{name}: {size}" if name else size]
    if result.defined:
        largest = f", largest {result.largest_share:.0%}" if result.num_communities > 1 else ""
        plural = "community" if result.num_communities == 1 else "communities"
        lines += [_against_chance(result), f"{result.num_communities} {plural}{largest}"]
    return lines


def _against_chance(result: CommunityResult) -> str:
    modularity = f"Q {result.modularity:.3f}"
    if not math.isfinite(result.modularity_null):
        return f"{modularity} (no null)"
    chance = f"{modularity}, by chance {result.modularity_null:.3f}"
    z = result.modularity_z
    if not math.isfinite(z):
        return chance
    verdict = "clearer than chance" if z >= 3 else "below chance" if z <= -3 else "no more than chance"
    return f"{chance}: {verdict} (z {z:.1f})"


def _weight_in_words(weight: str) -> str:
    return {
        "correlation": "correlation of two units (negative as 0)",
        "correlation_squared": "squared correlation of two units",
        "phi": "correlation of on/off states (negative as 0)",
        "coactivation": "fraction of samples with both units on",
    }.get(weight, weight)
