"""Figure of the reordered graph with its communities, one panel per layer."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lightning_neuro.communities.result import CommunityResult
from lightning_neuro.figure_panels import Array, Panel, draw_cells, draw_lines, say
from lightning_neuro.figure_words import wrapped, write
from lightning_neuro.figures import (
    CARD,
    DPI,
    OUTLINE,
    SEQUENTIAL,
    first_panels,
    layers_left_out,
    new_figure,
    short_name,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_PIXELS = 220
_PANEL = MAX_PIXELS / DPI
_BOTTOM, _SIDE, _GAP, _BAR = 0.4, 0.15, 0.2, 0.6  # inches
_LEAST_DARKEST = 0.05  # each panel has its own scale, but weights below this are not amplified to look like structure

Image = npt.NDArray[np.float32]


def plot_communities(results: Mapping[str, CommunityResult]) -> "Figure":
    """Draw each layer's graph as a matrix whose units are sorted by community.

    A dark cell is a pair of units that are active together. Communities are outlined squares along the diagonal, the
    largest first. Dark squares on a light background are clear groups; if the squares are hardly darker than the rest,
    there are no groups, whatever the modularity. The title compares the modularity with that of shuffled activations.

    Large layers are averaged down to 220 x 220 cells, and at most 8 layers are drawn, to limit the cost.

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
    shown, rows, columns = first_panels(results)
    images = [_sorted_image(result) if result.defined else None for _, result in shown]
    width = max(_SIDE + columns * (_PANEL + _GAP) + _BAR, CARD)
    foot = "Units sorted by community (outlined). Q: modularity; by chance: mean Q of shuffled activations."
    foot = wrapped(f"{foot} {layers_left_out(len(results))}", width - 2 * _SIDE)
    bottom = _BOTTOM + 0.14 * foot.count("\n")
    titles = [_title(short_name(name), result) for name, result in shown]
    above = 0.1 + 0.14 * max(title.count("\n") + 2 for title in titles)
    height = rows * (above + _PANEL) + bottom
    figure = new_figure(width, height)
    squares: list[Array] = []
    for number, ((_, result), title, image) in enumerate(zip(shown, titles, images, strict=True)):
        row, column = divmod(number, columns)
        panel = Panel(_SIDE + column * (_PANEL + _GAP), height - (row + 1) * (above + _PANEL), _PANEL, _PANEL)
        _draw_panel(figure, panel, image, title, result)
        squares += [] if image is None else _squares(panel, result)
    draw_lines(figure, squares, OUTLINE, 1.0)
    if any(image is not None for image in images):
        _draw_scale(figure, width - _BAR, bottom, _weight_in_words(shown[0][1].weight))
    write(figure, _SIDE, 0.08, foot, va="bottom")
    return figure


def _draw_panel(figure: "Figure", panel: Panel, image: Image | None, title: str, result: CommunityResult) -> None:
    if image is None:
        draw_lines(figure, [panel.outline])
        say(figure, panel, wrapped(result.notes()["undefined"], 0.9 * _PANEL))
    else:
        darkest = max(float(np.quantile(image, 0.995)), _LEAST_DARKEST)
        title += f"\ndarkest blue: {darkest:.2f} or more"
        _show(figure, image / darkest, (panel.left, panel.bottom), (_PANEL, _PANEL))
    write(figure, panel.left, panel.top + 0.05, title, va="bottom")


def _squares(panel: Panel, result: CommunityResult) -> list[Array]:
    """The outlines of the communities that are larger than a pixel, the first at the upper left."""
    units = len(result.units)
    ends = np.cumsum(np.bincount(result.labels.numpy()))
    starts = np.concatenate([[0], ends[:-1]])
    visible = ends - starts > max(1, units / MAX_PIXELS)
    inside = Panel(panel.left, panel.bottom, panel.width, panel.height, (0, units), (units, 0))
    pairs = zip(starts[visible].tolist(), ends[visible].tolist(), strict=True)
    return [inside.points([a, b, b, a, a], [a, a, b, b, a]) for a, b in pairs]


def _draw_scale(figure: "Figure", left: float, bottom: float, meaning: str) -> None:
    _show(figure, np.linspace(1, 0, 64, dtype=np.float32)[:, None], (left, bottom), (0.13, _PANEL))
    write(figure, left + 0.17, bottom, "0", size=7, va="bottom")
    write(figure, left + 0.17, bottom + _PANEL, "darkest", size=7, va="top")
    write(
        figure,
        left + 0.19,
        bottom + 0.2,
        wrapped(f"edge weight = {meaning}", 1.75, 7),
        size=7,
        va="bottom",
        upwards=True,
    )


def _show(figure: "Figure", image: Image, corner: tuple[float, float], size: tuple[float, float]) -> None:
    draw_cells(figure, image, corner, size, cmap=SEQUENTIAL, vmin=0.0, vmax=1.0)


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


def _title(name: str, result: CommunityResult) -> str:
    size = f"{len(result.units):,} units, {result.num_samples:,} samples"
    lines = [wrapped(f"{name}: {size}" if name else size, _PANEL)]
    if result.defined:
        largest = f", largest {result.largest_share:.0%}" if result.num_communities > 1 else ""
        plural = "community" if result.num_communities == 1 else "communities"
        lines += [_against_chance(result), f"{result.num_communities} {plural}{largest}"]
    return "\n".join(lines)


def _against_chance(result: CommunityResult) -> str:
    modularity = f"Q {result.modularity:.3f}"
    if not math.isfinite(result.modularity_null):
        return f"{modularity} (no null)"
    chance, z = f"by chance {result.modularity_null:.3f}", result.modularity_z
    if not math.isfinite(z):
        return f"{modularity}, {chance}"
    verdict = "clearer than chance" if z >= 3 else "below chance" if z <= -3 else "no more than chance"
    return f"{modularity}: {verdict}\n({chance}, z {z:.1f})"


def _weight_in_words(weight: str) -> str:
    return {
        "correlation": "correlation of two units (negative as 0)",
        "correlation_squared": "squared correlation of two units",
        "phi": "correlation of on/off states (negative as 0)",
        "coactivation": "fraction of samples with both units on",
    }.get(weight, weight)
