"""Figures: which attributes can be predicted from which layers, and what single units denote over depth."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_neuro import figures
from lightning_neuro.checks import require
from lightning_neuro.figure_panels import TICK, Panel, draw_areas, draw_cells, draw_lines, draw_points, y_ticks
from lightning_neuro.figure_words import width_of, wrapped, write
from lightning_neuro.observers.depth import DepthCurve
from lightning_neuro.observers.result import ObserverResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_ATTRIBUTES = 40
MAX_WRITTEN = 64
_CELL, _ROW, _GAP = 0.3, 0.19, 0.15  # inches
_SCALE: dict[str, Any] = {"cmap": figures.SCORE, "vmin": 0.5, "vmax": 1.0}


def plot_attributes(
    results: Mapping[str, ObserverResult],
) -> "Figure":
    """Draw the balanced accuracy of every attribute at every layer, next to that of the raw input and before training.

    Rows are attributes, columns layers (the first 8); blue is chance (.5 or less), yellow is 1. The effect of training
    is the difference between the right block and those to its left (the raw input, and the same layers before
    training). Grey cells are undefined. The fraction of the samples with the attribute is given in brackets.

    Args:
        results: Layer -> result.

    Returns:
        A matplotlib figure that is not registered with pyplot, so it need not be closed.

    Raises:
        ArgumentError: If there is no result to draw.

    Example:
        >>> import torch
        >>> from lightning_neuro.observers import read_attributes
        >>> x, labels = torch.randn(60, 4), torch.arange(60) % 3
        >>> results = {"fc1": read_attributes(x, labels)}
        >>> figure = plot_attributes(results)
    """
    require(len(results) > 0, "results", "hold at least one layer", "none")
    layers = list(results)[: figures.MAX_PANELS]
    result = results[layers[0]]
    names = result.names[:MAX_ATTRIBUTES]
    blocks = _blocks({layer: results[layer] for layer in layers}, names)

    heads = [
        f"{figures.short_name(name)} [{share:.0%}]"
        for name, share in zip(names, result.label_proportion.tolist(), strict=False)
    ]
    columns = [figures.short_name(column) for _, names_of, _ in blocks for column in names_of]
    left, bottom = 0.2 + max(map(width_of, heads), default=0.5), 0.2 + max(map(width_of, columns))
    width = left + _CELL * len(columns) + _GAP * len(blocks) + 0.55
    tall = max(1, len(names)) * _ROW
    more = len(result.names) - len(names)
    heading = f"Held-out balanced accuracy of linear observers; {result.num_samples:,} samples; chance: .5"
    parts = [heading, f"{more} more attributes not drawn" if more else "", figures.layers_left_out(len(results))]
    text = wrapped("; ".join(filter(None, parts)), width - 0.2)
    height = bottom + tall + 0.4 + 0.14 * (1 + text.count("\n"))
    figure, x, room = figures.new_figure(width, height), left, MAX_WRITTEN
    write(figure, 0.1, height - 0.06, text, va="top")
    for row, head in enumerate(heads):
        write(figure, left - 0.07, bottom + tall - (row + 0.5) * _ROW, head, ha="right")
    # If there is no space for all numbers, those of the current layers are written.
    written = {title: (room := room - len(names) * len(names_of)) >= 0 for title, names_of, _ in reversed(blocks)}
    for title, names_of, values in blocks:
        _draw_block(figure, (x, bottom), title, names_of, values, written=written[title])
        x += _CELL * len(names_of) + _GAP
    draw_cells(figure, np.linspace(1, 0.5, 64)[:, None], (x, bottom), (0.14, tall), **_SCALE)
    for share, word in ((0.0, "≤ .5"), (0.5, ".75"), (1.0, "1")):
        write(figure, x + 0.19, bottom + share * tall, word, size=7)
    return figure


def _blocks(
    results: Mapping[str, ObserverResult], names: Sequence[str]
) -> list[tuple[str, list[str], "np.ndarray[Any, Any]"]]:
    """Title, columns and (attributes, columns) values of each block of the figure."""
    blocks = []
    raw = next(iter(results.values())).raw_input[: len(names), 0]
    if raw.isfinite().any():
        blocks.append(("input", ["raw input"], [raw.tolist()]))
    start = [result.initial[: len(names), 0].tolist() or [float("nan")] * len(names) for result in results.values()]
    if any(isfinite(value) for column in start for value in column):
        blocks.append(("before training", list(results), start))
    now = [result.balanced_accuracy[: len(names)].tolist() for result in results.values()]
    blocks.append(("now", list(results), now))
    return [
        (title, columns, np.array(scores, dtype=float).T.reshape(len(names), len(columns)))
        for title, columns, scores in blocks
    ]


def _draw_block(
    figure: "Figure",
    corner: tuple[float, float],
    title: str,
    columns: Sequence[str],
    values: "np.ndarray[Any, Any]",
    *,
    written: bool,
) -> None:
    left, bottom = corner
    wide, tall = _CELL * len(columns), _ROW * max(1, len(values))
    draw_cells(figure, values, corner, (wide, tall), **_SCALE)
    write(figure, left + wide / 2, bottom + tall + 0.05, wrapped(title, max(wide, 0.5)), ha="center", va="bottom")
    for column, name in enumerate(columns):
        x = left + (column + 0.5) * _CELL
        write(figure, x, bottom - 0.06, figures.short_name(name), ha="center", va="top", upwards=True)
    for (row, column), value in np.ndenumerate(values) if written else ():
        text = "-" if np.isnan(value) else f"{value:.2f}".replace("0.", ".")
        color = "white" if value < 0.75 else "black"
        write(figure, left + (column + 0.5) * _CELL, bottom + tall - (row + 0.5) * _ROW, text, color=color, ha="center")


def plot_proportion(curve: DepthCurve, layers: Sequence[str]) -> "Figure":
    """Draw the size of the sets of classes that single units denote, over depth, with its null.

    A point is the mean over a layer's significant units of the fraction of samples in the unit's own set of classes (or
    outside of it, if smaller); the band holds 90 % of these means if the labels are shuffled within each unit. Only
    points outside the band are evidence for an effect of depth.

    Args:
        curve: What `depth_curve` returned.
        layers: Names of the layers, in order.

    Returns:
        A matplotlib figure that is not registered with pyplot, so it need not be closed.
    """
    every = -(-len(layers) // figures.MAX_PANELS)
    names = [figures.short_name(name, 20) for name in layers[::every]]
    width = max(figures.CARD, 0.7 + len(names) * max([0.8, *(0.1 + width_of(name, TICK) for name in names)]))
    margin = 0.5 / len(names)
    figure = figures.new_figure(width, 3.2)
    panel = Panel(0.55, 0.65, width - 0.65, 1.75, (-margin, 1 + margin), (0, 0.52))
    draw_lines(figure, [panel.outline])
    depth = curve.depth.numpy()
    drawn = curve.null.isfinite().all(0)
    if drawn.any():
        low, high = (torch.quantile(curve.null[:, drawn], q, dim=0).numpy() for q in (0.05, 0.95))
        at = depth[drawn.numpy()]
        band = np.concatenate([panel.points(at, high), panel.points(at[::-1], low[::-1])])
        draw_areas(figure, [band], figures.FAINT)
        draw_lines(
            figure, list(np.stack([panel.points(at, low), panel.points(at, high)], 1)), figures.NULL, 5, alpha=0.6
        )
        means = panel.points(depth, curve.proportion.numpy())
        draw_lines(figure, [means], figures.VALUE, 1.5)
        draw_points(figure, means, "o", figures.VALUE, 6)
    else:
        write(figure, *panel.middle, "no layer has significant units", ha="center")
    for place, name, count in zip(depth[::every], names, curve.num_significant[::every].tolist(), strict=True):
        words = f"{name}\n{count} units"
        write(figure, panel.x(place), panel.bottom - 0.06, words, size=TICK, ha="center", va="top")
    y_ticks(figure, panel, {0: "0", 0.25: ".25", 0.5: ".5"})
    write(figure, 0.12, panel.middle[1], "folded label proportion", ha="center", upwards=True)
    found = curve.scalars()
    text = "Spearman correlation with depth: undefined"
    if found:
        rho, null, p = found.values()
        text = f"Spearman correlation with depth {rho:.2f}; null {null:.2f} (p = {p:.3f})"
    write(
        figure,
        0.1,
        3.12,
        f"size of the sets that single units denote\n{wrapped(text, width - 0.2, 9)}",
        size=9,
        va="top",
    )
    write(figure, 0.1, 0.14, "points: mean of significant units; grey: shuffled (90 %)")
    return figure
