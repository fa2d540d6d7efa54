"""Figures: maps of attributes by units, and contributions of units to the scores of single samples."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_neuro import figures
from lightning_neuro.checks import require
from lightning_neuro.figure_panels import Panel, draw_areas, draw_cells, draw_lines, x_ticks
from lightning_neuro.figure_words import width_of, wrapped, write
from lightning_neuro.observers.plot import MAX_ATTRIBUTES
from lightning_neuro.observers.result import ObserverResult

if TYPE_CHECKING:
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
    heads = [figures.short_name(name, 20) for name in names]
    columns = [max(6, image.shape[1]) for image in images.values()]
    left, gap, bottom, row = 0.2 + max(map(width_of, heads), default=0.5), 0.15, 0.25, 0.17
    cell, tall = min(0.12, max(0.03, 6.0 / sum(columns))), max(3, len(names)) * row
    rooms = [max(0.85, cell * count) for count in columns]
    width = max(left + sum(rooms) + gap * len(rooms) + 0.6, 4.5)
    title = wrapped(title, width - 0.2)
    height = bottom + tall + 0.5 + 0.14 * (1 + title.count("\n"))
    figure = figures.new_figure(width, height)
    x, step = left, tall / max(1, len(names))
    write(figure, 0.1, height - 0.06, title, va="top")
    for number, head in enumerate(heads):
        write(figure, left - 0.07, bottom + tall - (number + 0.5) * step, head, ha="right")
    scale: dict[str, Any] = {"cmap": figures.DIVERGING, "vmin": -largest, "vmax": largest}
    for (layer, image), room in zip(images.items(), rooms, strict=True):
        draw_cells(figure, image.numpy(), (x, bottom), (room, tall), **scale)
        head = f"{figures.short_name(layer, max(12, int(14 * room)))}\n{masses[layer] / total:.0%} of mass"
        write(figure, x + room / 2, bottom + tall + 0.05, head, ha="center", va="bottom")
        units = f"{image.shape[1]} of {layers[layer].shape[1]:,} units"
        write(figure, x + room / 2, bottom - 0.05, units, size=7, ha="center", va="top")
        x += room + gap
    draw_cells(figure, np.linspace(largest, -largest, 65)[:, None], (x, bottom), (0.12, tall), **scale)
    for share, value in ((0.0, -largest), (0.5, 0.0), (1.0, largest)):
        write(figure, x + 0.16, bottom + share * tall, f"{value:.2g}", size=7)
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
    wide, tall, left = 1.6, 0.16 * (units + 1), 0.8
    figure = figures.new_figure(max(count * (left + wide + 0.15), 4.9), tall + 1.0)
    width, height = figure.get_size_inches()
    title = f"Contributions of units of {figures.short_name(layer)} to scores of single samples"
    write(figure, 0.1, height - 0.14, title, size=9)
    if not count:
        write(figure, width / 2, height / 2, "no sample has one of the first attributes", ha="center")
        return figure
    taken: set[int] = set()
    for number, (state, known) in enumerate(zip(result.examples, result.example_attributes, strict=False)):
        if number == count:
            break
        has = [a for a in torch.nonzero(known == 1).flatten().tolist() if a not in taken]
        attribute = has[0] if has else int(known.nan_to_num(nan=0.0).argmax())
        taken.add(attribute)
        panel = Panel(left + number * (left + wide + 0.15), 0.3, wide, tall)
        _draw_parts(figure, panel, result, state, attribute, units)
    return figure


def _draw_parts(
    figure: "Figure", panel: Panel, result: ObserverResult, state: Tensor, attribute: int, units: int
) -> None:
    parts = result.explain(state, attribute)
    largest = parts.abs().argsort(descending=True)[:units]
    rest = float(parts.sum() - parts[largest].sum())
    values = [*parts[largest].tolist(), rest]
    labels = [*(f"unit {int(unit)}" for unit in largest), "all others"]
    colors = [figures.OTHER if value > 0 else figures.VALUE for value in values]
    low, high = min(0.0, *values), max(0.0, *values)
    spare = 0.08 * (high - low) or 1.0
    panel = replace(panel, x_range=(low - spare, high + spare), y_range=(len(values), 0))
    bars = [panel.area([min(0.0, value), max(0.0, value)], row + 0.1, row + 0.9) for row, value in enumerate(values)]
    draw_areas(figure, bars, colors)
    draw_lines(figure, [panel.outline, panel.points([0, 0], [0, len(values)])])
    for row, label in enumerate(labels):
        write(figure, panel.left - 0.06, panel.y(row + 0.5), label, ha="right")
    ticks = [0.0, *(end for end in (low, high) if abs(end) > 0.25 * (high - low))]  # far enough apart
    x_ticks(figure, panel, {value: f"{value:.2g}" for value in ticks})
    name = figures.short_name(result.names[attribute], 20)
    write(figure, panel.left, panel.top + 0.05, f"a sample with {name}\nscore {float(parts.sum()):.2f}", va="bottom")
