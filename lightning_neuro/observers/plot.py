"""Figures: which attributes can be predicted from which layers, and what single units denote over depth."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_neuro import figures
from lightning_neuro.checks import require
from lightning_neuro.observers.depth import DepthCurve
from lightning_neuro.observers.result import ObserverResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_ATTRIBUTES = 40
MAX_WRITTEN = 64
_CELL, _ROW = 0.62, 0.27  # inches
_SCALE = {"cmap": figures.SCORE, "vmin": 0.5, "vmax": 1.0}


def show_cells(
    axes: "Axes", values: "np.ndarray[Any, Any]", corner: tuple[float, float], size: tuple[float, float], **scale: Any
) -> None:
    """Draw numbers as a framed table of colours; all sizes in inches."""
    from matplotlib.patches import Rectangle

    (left, bottom), (width, height) = corner, size
    extent = (left, left + width, bottom, bottom + height)
    axes.add_patch(Rectangle(corner, width, height, facecolor=figures.FAINT, edgecolor=figures.INK, lw=0.8))
    if values.size:
        axes.imshow(
            np.ma.masked_invalid(values), extent=extent, aspect="auto", interpolation="nearest", zorder=2, **scale
        )


def plot_attributes(
    results: Mapping[str, ObserverResult],
    *,
    initial: Mapping[str, Sequence[float]] | None = None,
    from_input: Mapping[str, float] | None = None,
) -> "Figure":
    """Draw the balanced accuracy of every attribute at every layer, next to that of the raw input and before training.

    Rows are attributes, columns layers (the first 8); blue is chance (.5 or less), yellow is 1. The effect of training
    is the difference between the right block and those to its left (the raw input, and the same layers before
    training). Grey cells are undefined. The fraction of the samples with the attribute is given in brackets.

    Args:
        results: Layer -> result.
        initial: Layer -> the attributes' balanced accuracies before training.
        from_input: Attribute -> balanced accuracy of an observer of the raw input.

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
    blocks = _blocks({layer: results[layer] for layer in layers}, names, initial or {}, from_input or {})

    count = sum(len(columns) for _, columns, _ in blocks)
    left, bottom, top, tall = 2.6, 1.15, 0.75, max(1, len(names)) * _ROW
    figure = figures.new_figure(left + _CELL * count + 0.25 * len(blocks) + 0.8, bottom + tall + top)
    axes, x, room = figures.inch_axes(figure), left, MAX_WRITTEN
    for row, (name, share) in enumerate(zip(names, result.label_proportion.tolist(), strict=False)):
        y = bottom + tall - (row + 0.5) * _ROW
        axes.text(left - 0.07, y, f"{figures.short_name(name)} [{share:.0%}]", fontsize=8, ha="right", va="center")
    # If there is no space for all numbers, those of the current layers are written.
    written = {title: (room := room - len(names) * len(columns)) >= 0 for title, columns, _ in reversed(blocks)}
    for title, columns, values in blocks:
        _draw_block(axes, (x, bottom), title, columns, values, written=written[title])
        x += _CELL * len(columns) + 0.25
    show_cells(axes, np.linspace(1, 0.5, 64)[:, None], (x, bottom), (0.14, tall), **_SCALE)
    for share, word in ((0.0, "≤ .5"), (0.5, ".75"), (1.0, "1")):
        axes.text(x + 0.19, bottom + share * tall, word, fontsize=7, va="center")
    more = len(result.names) - len(names)
    heading = f"Balanced accuracy of linear observers on held-out samples; {result.num_samples:,} samples; chance is .5"
    parts = [heading, f"{more} more attributes not drawn" if more else "", figures.layers_left_out(len(results))]
    width, height = figure.get_size_inches()
    text = textwrap.fill("; ".join(filter(None, parts)), int(width * 12))
    axes.text(0.1, height - 0.08, text, fontsize=9, va="top")
    return figure


def _blocks(
    results: Mapping[str, ObserverResult],
    names: Sequence[str],
    initial: Mapping[str, Sequence[float]],
    from_input: Mapping[str, float],
) -> list[tuple[str, list[str], "np.ndarray[Any, Any]"]]:
    """Title, columns and (attributes, columns) values of each block of the figure."""
    nan = float("nan")
    blocks = []
    if from_input:
        blocks.append(("input", ["raw input"], [[from_input.get(name, nan) for name in names]]))
    if initial:
        before = [list(initial.get(layer) or [nan] * len(names))[: len(names)] for layer in results]
        blocks.append(("before training", list(results), before))
    now = [result.balanced_accuracy[: len(names)].tolist() for result in results.values()]
    blocks.append(("now", list(results), now))
    return [
        (title, columns, np.array(scores, dtype=float).T.reshape(len(names), len(columns)))
        for title, columns, scores in blocks
    ]


def _draw_block(
    axes: "Axes",
    corner: tuple[float, float],
    title: str,
    columns: Sequence[str],
    values: "np.ndarray[Any, Any]",
    *,
    written: bool,
) -> None:
    left, bottom = corner
    wide, tall = _CELL * len(columns), _ROW * max(1, len(values))
    show_cells(axes, values, corner, (wide, tall), **_SCALE)
    axes.text(left + wide / 2, bottom + tall + 0.06, title, fontsize=8, ha="center", va="bottom")
    for column, name in enumerate(columns):
        x = left + (column + 0.7) * _CELL
        axes.text(x, bottom - 0.06, figures.short_name(name, 16), fontsize=8, rotation=45, ha="right", va="top")
    for (row, column), value in np.ndenumerate(values) if written else ():
        text = "-" if np.isnan(value) else f"{value:.2f}".replace("0.", ".")
        color = "white" if value < 0.75 else "black"
        x, y = left + (column + 0.5) * _CELL, bottom + tall - (row + 0.5) * _ROW
        axes.text(x, y, text, fontsize=7, ha="center", va="center", color=color)


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
    figure = figures.new_figure(6.4, 3.9)
    panel = figure.add_axes((0.11, 0.3, 0.86, 0.54))
    depth = curve.depth.numpy()
    drawn = curve.null.isfinite().all(0)
    if drawn.any():
        low, high = (torch.quantile(curve.null[:, drawn], q, dim=0).numpy() for q in (0.05, 0.95))
        at = depth[drawn.numpy()]
        panel.fill_between(at, low, high, color=figures.FAINT, lw=0)
        panel.vlines(at, low, high, color=figures.NULL, lw=6, alpha=0.6)
        panel.plot(depth, curve.proportion.numpy(), "o-", color=figures.VALUE, ms=6)
    else:
        panel.text(0.5, 0.25, "no layer has significant units", ha="center", fontsize=9)
    ticks = [
        f"{figures.short_name(name, 14)}\n{int(count)} units"
        for name, count in zip(layers, curve.num_significant, strict=True)
    ]
    panel.set_xticks(depth, ticks, fontsize=7, rotation=30, ha="right")
    panel.set_xlim(-0.05, 1.05)
    panel.set_ylim(0, 0.52)
    panel.set_yticks([0, 0.25, 0.5], ["0", ".25", ".5"], fontsize=8)
    panel.set_ylabel("folded label proportion", fontsize=8)
    found = curve.scalars()
    text = "Spearman correlation with depth: undefined"
    if found:
        rho, null, p = found.values()
        text = f"Spearman correlation with depth {rho:.2f}; null {null:.2f} (p = {p:.3f})"
    figure.text(0.02, 0.97, f"Size of the sets that single units denote, over depth\n{text}", fontsize=9, va="top")
    figure.text(0.02, 0.02, "points: significant units; grey: 90 % of shuffled labels", fontsize=7, color=figures.INK)
    return figure
