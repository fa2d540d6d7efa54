"""Figures: maps of attributes by units, and contributions of units to the scores of single samples."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lightning_neuro import figures
from lightning_neuro.checks import require
from lightning_neuro.observers.plot import MAX_ATTRIBUTES, show_cells
from lightning_neuro.observers.result import ObserverResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_UNITS = 48
_MAPS = {
    "weights": "Weight of each unit x its standard deviation: what the observer uses (blank: sign not stable)",
    "patterns": "Correlation of each unit with the attribute: where the attribute is encoded",
    "effects": "Fraction of the class difference lost with the unit at its mean: what the observer needs",
}


def plot_maps(results: Mapping[str, ObserverResult]) -> dict[str, "Figure"]:
    """Draw the three maps of attributes by units: weights, patterns, effects.

    Layers (the first 8) are drawn side by side; a map has one scale, red above and blue below 0. The 48 units with the
    largest values are drawn for each layer, sorted by the attribute for which they are largest; the heading gives the
    layer's fraction of the map's mass (sum of absolute values). Weight and pattern differ: a unit can have a large
    weight only to cancel noise in another one (Haufe et al., 2014); the pattern shows where the attribute is encoded. A
    weight or effect is drawn only if the observers of all folds agree on its sign.

    Args:
        results: Layer -> result.

    Returns:
        Name -> matplotlib figure that is not registered with pyplot.

    Raises:
        ArgumentError: If there is no result.
    """
    require(len(results) > 0, "results", "hold at least one layer", "none")
    shown = dict(list(results.items())[: figures.MAX_PANELS])
    values = {
        # An attribute without an observer has NaN weights, which would leave no scale.
        "weights": {
            layer: (result.weights * result.std * result.stable).nan_to_num(nan=0.0) for layer, result in shown.items()
        },
        "patterns": {layer: result.pattern for layer, result in shown.items()},
        "effects": {layer: result.effect * result.stable for layer, result in shown.items()},
    }
    names = next(iter(shown.values())).names[:MAX_ATTRIBUTES]
    samples = next(iter(shown.values())).num_samples
    facts = "; ".join(filter(None, [f"{samples:,} samples", figures.layers_left_out(len(results))]))
    return {name: _plot_map(f"{_MAPS[name]}; {facts}", layers, names) for name, layers in values.items()}


def _plot_map(title: str, layers: Mapping[str, Tensor], names: tuple[str, ...]) -> "Figure":
    largest = max(float(value.abs().max()) if value.numel() else 0.0 for value in layers.values()) or 1.0
    masses = {layer: float(value.abs().sum()) for layer, value in layers.items()}
    total = sum(masses.values()) or 1.0
    images = {layer: _largest_units(value)[: len(names)] for layer, value in layers.items()}
    columns = [max(6, image.shape[1]) for image in images.values()]
    left, gap, bottom, top, row = 1.9, 0.2, 0.35, 0.85, 0.22
    cell, tall = min(0.16, max(0.05, 9.6 / sum(columns))), max(3, len(names)) * row
    rooms = [max(0.85, cell * count) for count in columns]
    figure = figures.new_figure(left + sum(rooms) + gap * len(rooms) + 0.75, bottom + tall + top)
    axes, x, step = figures.inch_axes(figure), left, tall / max(1, len(names))
    for number, name in enumerate(names):
        y = bottom + tall - (number + 0.5) * step
        axes.text(left - 0.07, y, figures.short_name(name, 20), fontsize=8, ha="right", va="center")
    scale = {"cmap": figures.DIVERGING, "vmin": -largest, "vmax": largest}
    for (layer, image), room in zip(images.items(), rooms, strict=True):
        show_cells(axes, image.numpy(), (x, bottom), (room, tall), **scale)
        head = f"{figures.short_name(layer, 14)}\n{masses[layer] / total:.0%} of mass"
        axes.text(x + room / 2, bottom + tall + 0.05, head, fontsize=7, ha="center", va="bottom")
        units = f"{image.shape[1]} of {layers[layer].shape[1]} units"
        axes.text(x + room / 2, bottom - 0.05, units, fontsize=7, ha="center", va="top")
        x += room + gap
    show_cells(axes, np.linspace(largest, -largest, 65)[:, None], (x, bottom), (0.12, tall), **scale)
    for share, value in ((0.0, -largest), (0.5, 0.0), (1.0, largest)):
        axes.text(x + 0.17, bottom + share * tall, f"{value:.2g}", fontsize=7, va="center")
    axes.text(0.1, bottom + tall + top - 0.08, title, fontsize=8, va="top")
    return figure


def _largest_units(values: Tensor) -> Tensor:
    """(A, at most 48), the columns with the largest values, sorted by attribute, then by size."""
    if not values.numel():
        return values
    size, attribute = values.abs().max(0)
    chosen = size.argsort(descending=True)[: min(MAX_UNITS, max(1, int((size > 0).sum())))]
    order = np.lexsort((-size[chosen].numpy(), attribute[chosen].numpy()))
    return values[:, chosen[torch.from_numpy(order)]]


def plot_explanation(results: Mapping[str, ObserverResult], *, units: int = 10) -> "Figure":
    """Draw the contribution of each unit to the scores of two samples, at the layer with the best observers.

    The bars and "all others" sum to the score exactly. A score that comes from one or two units can be traced to them;
    one that is spread over all units cannot.

    Args:
        results: Layer -> result.
        units: Number of contributions that are drawn for each sample, the largest ones.

    Returns:
        A matplotlib figure that is not registered with pyplot, so it need not be closed.

    Raises:
        ArgumentError: If there is no result.
    """
    require(len(results) > 0, "results", "hold at least one layer", "none")
    layer, result = max(results.items(), key=lambda item: item[1].scalars().get("balanced_accuracy", 0.0))
    count = min(len(result.examples), 2)
    figure = figures.new_figure(3.1 * max(1, count) + 0.3, 3.1)
    figure.text(
        0.02,
        0.97,
        f"Contributions of units of {figures.short_name(layer)} to scores of single samples",
        fontsize=9,
        va="top",
    )
    if not count:
        figure.text(0.5, 0.5, "no sample has one of the first attributes", ha="center", fontsize=9)
        return figure
    panels = figure.subplots(1, count, squeeze=False)[0]
    figure.subplots_adjust(left=0.85 / (3.1 * count), right=0.98, bottom=0.13, top=0.74, wspace=0.55)
    taken: set[int] = set()
    for panel, state, known in zip(panels, result.examples, result.example_attributes, strict=False):
        has = [a for a in torch.nonzero(known == 1).flatten().tolist() if a not in taken]
        attribute = has[0] if has else int(known.nan_to_num(nan=0.0).argmax())
        taken.add(attribute)
        _draw_parts(panel, result, state, attribute, units)
    return figure


def _draw_parts(panel: "Axes", result: ObserverResult, state: Tensor, attribute: int, units: int) -> None:
    parts = result.explain(state, attribute)
    largest = parts.abs().argsort(descending=True)[:units]
    rest = float(parts.sum() - parts[largest].sum())
    values = [*parts[largest].tolist(), rest]
    labels = [*(f"unit {int(unit)}" for unit in largest), "all others"]
    colors = [figures.OTHER if value > 0 else figures.VALUE for value in values]
    places = list(range(len(values)))[::-1]
    panel.barh(places, values, color=colors, height=0.8)
    panel.axvline(0, color=figures.INK, lw=0.8)
    panel.set_yticks(places, labels, fontsize=7)
    panel.tick_params(length=0, labelsize=7)
    panel.set_title(
        f"a sample with {figures.short_name(result.names[attribute], 20)}\nscore {float(parts.sum()):.2f}", fontsize=8
    )
