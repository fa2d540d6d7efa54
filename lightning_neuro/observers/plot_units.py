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

MAX_UNITS = 24
_MAPS = {
    "weights": "Weight of each unit x its standard deviation: what the observer uses (blank: sign not stable)",
    "patterns": "Correlation of each unit with the attribute: where the attribute is encoded",
    "effects": "Fraction of the class difference lost with the unit at its mean: what the observer needs",
}


def plot_maps(results: Mapping[str, ObserverResult]) -> dict[str, "Figure"]:
    """Draw the three maps of attributes by units: weights, patterns, effects.

    Each layer (of the first 8) has a figure; a map has one scale for all of them, red above and blue below 0. The 24
    units with the largest values are drawn, sorted by the attribute for which they are largest; the heading gives the
    layer's fraction of the map's mass (sum of absolute values). Weight and pattern differ: a unit can have a large
    weight only to cancel noise in another one (Haufe et al., 2014); the pattern shows where the attribute is encoded. A
    weight or effect is drawn only if the observers of all folds agree on its sign.

    Args:
        results: Layer -> result.

    Returns:
        `<map>/<layer>` -> matplotlib figure that is not registered with pyplot.

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
    found = {}
    for name, layers in values.items():
        largest = max(float(value.abs().max()) if value.numel() else 0.0 for value in layers.values()) or 1.0
        total = sum(float(value.abs().sum()) for value in layers.values()) or 1.0
        title = f"{_MAPS[name]}; {samples:,} samples"
        for layer, value in layers.items():
            found[f"{name}/{layer}"] = _plot_map(title, layer, value, names, largest=largest, total=total)
    return found


def _plot_map(
    title: str, layer: str, values: Tensor, names: tuple[str, ...], *, largest: float, total: float
) -> "Figure":
    """Draw the map of one layer, on a scale from -largest to largest; `total` is the mass of all layers."""
    image, units = _largest_units(values)
    image = image[: len(names)]
    heads = [figures.short_name(name, 16) for name in names]
    left, bottom, row = 0.15 + max(map(width_of, heads), default=0.5), 0.62, 0.17
    wide = max(1.6, figures.CARD - left - 0.5)
    width, tall = left + wide + 0.5, max(3, len(names)) * row
    mass = float(values.abs().sum()) / total
    words = f"{title}; {mass:.0%} of the mass of all layers"
    title = wrapped(words, width - 0.2)
    height = bottom + tall + 0.4 + 0.14 * (1 + title.count("\n"))
    figure = figures.new_figure(width, height)
    write(figure, 0.1, height - 0.06, figures.short_name(layer, 40), size=9, va="top", bold=True)
    write(figure, 0.1, height - 0.24, title, va="top")
    for number, head in enumerate(heads):
        write(figure, left - 0.07, bottom + tall - (number + 0.5) * tall / len(heads), head, ha="right")
    scale: dict[str, Any] = {"cmap": figures.DIVERGING, "vmin": -largest, "vmax": largest}
    draw_cells(figure, image.numpy(), (left, bottom), (wide, tall), **scale)
    for place, unit in enumerate(units.tolist()):
        x = left + (place + 0.5) * wide / len(units)
        write(figure, x, bottom - 0.04, str(unit), size=6, ha="center", va="top", upwards=True)
    write(figure, left, 0.1, f"units: the {len(units)} with the largest values of {values.shape[1]:,}", size=7)
    draw_cells(figure, np.linspace(largest, -largest, 65)[:, None], (left + wide + 0.08, bottom), (0.1, tall), **scale)
    for share, value in ((0.0, -largest), (0.5, 0.0), (1.0, largest)):
        write(figure, left + wide + 0.2, bottom + share * tall, f"{value:.2g}", size=7)
    return figure


def _largest_units(values: Tensor) -> tuple[Tensor, Tensor]:
    """The columns with the largest values, sorted by attribute, then by size: (A, at most 24), and their numbers."""
    if not values.numel():
        return values, torch.zeros(0, dtype=torch.int64)
    size, attribute = values.abs().max(0)
    chosen = size.argsort(descending=True)[: min(MAX_UNITS, max(1, int((size > 0).sum())))]
    order = np.lexsort((-size[chosen].numpy(), attribute[chosen].numpy()))
    chosen = chosen[torch.from_numpy(order)]
    return values[:, chosen], chosen


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
    wide, tall, left = 2.4, 0.16 * (units + 1), 0.8
    figure = figures.new_figure(figures.CARD, max(1, count) * (tall + 0.75) + 0.35)
    width, height = figure.get_size_inches()
    title = f"contributions of units of {figures.short_name(layer)} to scores"
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
        panel = Panel(left, height - 0.3 - (number + 1) * (tall + 0.75) + 0.3, wide, tall)
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
