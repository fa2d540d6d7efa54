"""Which attribute can be read where, and what single units stand for over depth; cheap enough for every evaluation."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_neuro.observers.depth import DepthCurve
from lightning_neuro.observers.result import ObserverResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_ATTRIBUTES = 40
MAX_WRITTEN = 64
_CELL, _ROW = 0.62, 0.27  # inches
_SCALE = {"cmap": "cividis", "vmin": 0.5, "vmax": 1.0}


def new_figure(width: float, height: float) -> "Figure":
    """A figure drawn by Agg and not known to pyplot, so there is nothing to close; in inches, 100 dots each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100)
    FigureCanvasAgg(figure)
    return figure


def inch_axes(figure: "Figure") -> "Axes":
    """One axes that is the whole figure, in inches: an axes for each panel would take several times as long to draw."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height), autoscale_on=False)
    axes.set_axis_off()
    return axes


def show_cells(
    axes: "Axes", values: "np.ndarray[Any, Any]", corner: tuple[float, float], size: tuple[float, float], **scale: Any
) -> None:
    """A table of numbers as colours, framed, with its lower left corner there; all in inches."""
    from matplotlib.patches import Rectangle

    (left, bottom), (width, height) = corner, size
    extent = (left, left + width, bottom, bottom + height)
    axes.add_patch(Rectangle(corner, width, height, facecolor="0.75", edgecolor="0.2", lw=0.8))
    if values.size:
        axes.imshow(
            np.ma.masked_invalid(values), extent=extent, aspect="auto", interpolation="nearest", zorder=2, **scale
        )


def short(name: str, length: int = 24) -> str:
    """A name that fits beside a picture."""
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-length // 2 :]}"


def plot_attributes(
    results: Mapping[str, ObserverResult],
    *,
    initial: Mapping[str, Sequence[float]] | None = None,
    from_input: Mapping[str, float] | None = None,
) -> "Figure":
    """Draw the balanced accuracy of every attribute at every layer, beside what the raw input and the start give.

    Rows are attributes, columns layers; blue is chance (.5 or less), yellow 1. What the network has made of its data is
    what is brighter on the right than at the left: than the raw input, and than the same layer before training. Grey
    cells are undefined. In brackets stands the share of the samples with the attribute.

    Args:
        results: Layer -> result.
        initial: Layer -> the attributes' balanced accuracies before training.
        from_input: Attribute -> balanced accuracy from the raw input.

    Raises:
        ValueError: If there is no result.

    Example:
        >>> import torch
        >>> from lightning_neuro.observers import read_attributes
        >>> figure = plot_attributes({"fc1": read_attributes(torch.randn(60, 4), torch.arange(60) % 3)})
    """
    if not results:
        raise ValueError("results must hold at least one layer, got none.")
    layers = list(results)
    names = results[layers[0]].names[:MAX_ATTRIBUTES]
    nothing = [float("nan")] * len(names)
    blocks: list[tuple[str, list[str], Any]] = []
    if from_input:
        blocks.append(("input", ["raw input"], [[from_input.get(name, float("nan")) for name in names]]))
    if initial:
        before = [list(initial.get(layer) or nothing)[: len(names)] for layer in layers]
        blocks.append(("before training", layers, before))
    now = [results[layer].balanced_accuracy[: len(names)].tolist() for layer in layers]
    blocks.append(("now", layers, now))

    count = sum(len(columns) for _, columns, _ in blocks)
    left, bottom, top, tall = 2.6, 1.15, 0.75, max(1, len(names)) * _ROW
    figure = new_figure(left + _CELL * count + 0.25 * len(blocks) + 0.8, bottom + tall + top)
    axes, x, room = inch_axes(figure), left, MAX_WRITTEN
    result = results[layers[0]]
    for row, (name, share) in enumerate(zip(names, result.label_proportion.tolist(), strict=False)):
        y = bottom + tall - (row + 0.5) * _ROW
        axes.text(left - 0.07, y, f"{short(name)} [{share:.0%}]", fontsize=8, ha="right", va="center")
    # Where not all numbers can be written, those of now are.
    written = {title: (room := room - len(names) * len(columns)) >= 0 for title, columns, _ in reversed(blocks)}
    for title, columns, scores in blocks:
        values = np.array(scores, dtype=float).T.reshape(len(names), len(columns))
        _draw_block(axes, (x, bottom), title, columns, values, written=written[title])
        x += _CELL * len(columns) + 0.25
    show_cells(axes, np.linspace(1, 0.5, 64)[:, None], (x, bottom), (0.14, tall), **_SCALE)
    for share, word in ((0.0, "≤ .5"), (0.5, ".75"), (1.0, "1")):
        axes.text(x + 0.19, bottom + share * tall, word, fontsize=7, va="center")
    more = f"; {len(result.names) - len(names)} more attributes are not drawn" if len(result.names) > len(names) else ""
    heading = f"Balanced accuracy of linear observers, held out; {result.num_samples:,} samples; chance is .5{more}"
    width, height = figure.get_size_inches()
    axes.text(0.1, height - 0.08, textwrap.fill(heading, int(width * 12)), fontsize=9, va="top")
    return figure


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
        axes.text(x, bottom - 0.06, short(name, 16), fontsize=8, rotation=45, ha="right", va="top")
    for (row, column), value in np.ndenumerate(values) if written else ():
        text = "-" if np.isnan(value) else f"{value:.2f}".replace("0.", ".")
        color = "white" if value < 0.75 else "black"
        x, y = left + (column + 0.5) * _CELL, bottom + tall - (row + 0.5) * _ROW
        axes.text(x, y, text, fontsize=7, ha="center", va="center", color=color)


def plot_proportion(curve: DepthCurve, layers: Sequence[str]) -> "Figure":
    """Draw how large the sets of classes are that single units stand for, over depth, with what chance gives.

    A point is the mean over a layer's significant units of the share of samples in the unit's own set of classes (or
    out of it, if smaller); the band is where 90 % of the same means lie when the labels are shuffled within each unit.
    Only what leaves the band says something about depth.

    Args:
        curve: What `depth_curve` found.
        layers: Names of the layers, in order.
    """
    figure = new_figure(6.4, 3.9)
    panel = figure.add_axes((0.11, 0.3, 0.86, 0.54))
    depth = curve.depth.numpy()
    drawn = curve.null.isfinite().all(0)
    if drawn.any():
        low, high = (torch.quantile(curve.null[:, drawn], q, dim=0).numpy() for q in (0.05, 0.95))
        at = depth[drawn.numpy()]
        panel.fill_between(at, low, high, color="0.85", lw=0)
        panel.vlines(at, low, high, color="0.7", lw=6)
        panel.plot(depth, curve.proportion.numpy(), "o-", color="#0072b2", ms=6)
    else:
        panel.text(0.5, 0.25, "no layer has units beyond chance", ha="center", fontsize=9)
    ticks = [f"{short(name, 14)}\n{int(count)} units" for name, count in zip(layers, curve.units, strict=True)]
    panel.set_xticks(depth, ticks, fontsize=7, rotation=30, ha="right")
    panel.set_xlim(-0.05, 1.05)
    panel.set_ylim(0, 0.52)
    panel.set_yticks([0, 0.25, 0.5], ["0", ".25", ".5"], fontsize=8)
    panel.set_ylabel("folded label proportion", fontsize=8)
    found = curve.scalars()
    text = "Spearman correlation with depth: undefined"
    if found:
        rho, null, p = found.values()
        text = f"Spearman correlation with depth {rho:.2f}; by chance {null:.2f} (p {p:.3f})"
    figure.text(0.02, 0.97, f"What single units stand for, over depth\n{text}", fontsize=9, va="top")
    figure.text(0.02, 0.02, "points: units beyond chance; grey: 90 % of shuffled labels", fontsize=7, color="0.3")
    return figure
