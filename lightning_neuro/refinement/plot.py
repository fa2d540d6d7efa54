"""Figures: which sources shaped the output of a layer, on average over the probe set and for single inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from lightning_neuro.figure_panels import TICK, Panel, draw_areas, draw_cells, draw_lines
from lightning_neuro.figure_words import width_of, write
from lightning_neuro.figures import (
    DIVERGING,
    FAINT,
    NULL,
    OTHER,
    VALUE,
    class_name,
    first_panels,
    layers_left_out,
    new_figure,
    short_name,
)
from lightning_neuro.refinement.result import RefinementExplanation, RefinementResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_ROWS = 20
BANDWIDTH = 0.1  # of the density over cosines, as in the paper
_SIDE, _ABOVE = 1.8, 0.68  # inches: side of a heat map, space above it


def plot_refinement(results: Mapping[str, RefinementResult], class_names: Sequence[str] | None = None) -> "Figure":
    """Draw two heat maps per layer: the shares by class of the explained samples, and by phase of training.

    Args:
        results: Layer -> result.
        class_names: Names of the classes, if the sources are the classes; default: the names in the results.

    Returns:
        A matplotlib figure that is not registered with pyplot.
    """
    shown, rows, columns = first_panels(results, max_columns=1 if len(results) < 3 else 2)
    labels = [_names(result, class_names) for _, result in shown]
    widest = max(map(_widest, labels))
    room, under = 0.3 + widest, 0.5 + (widest if widest > _SIDE / MAX_ROWS else 0.1)
    block, tall = 2 * (room + _SIDE + 0.1), _ABOVE + _SIDE + under
    width, height = columns * block + 0.15, rows * tall + 0.3
    figure = new_figure(width, height)
    for number, ((layer, result), names) in enumerate(zip(shown, labels, strict=True)):
        row, column = divmod(number, columns)
        left = Panel(column * block + room, height - row * tall - _ABOVE - _SIDE, _SIDE, _SIDE)
        right = replace(left, left=left.right + 0.1 + room)
        own = slice(None, len(names))
        phases = [str(phase + 1) for phase in range(result.phase_shares.shape[1])]
        title = f"{layer}\nshare of the refinement,\nmean over {int(result.counts.sum()):,} samples".lstrip()
        null = f"class of the training samples\n(null, shuffled labels: {result.own_class_share_null:.2f})"
        _draw_heat_map(figure, left, result.shares[:-1][own, own], title, names, names, null)
        after = f"phase of training (1 to {len(phases)})"
        _draw_heat_map(figure, right, result.phase_shares[own], "share by phase of training", names, phases, after)
        for panel, words in ((left, "class of the explained sample"), (right, "class of the training samples")):
            write(figure, panel.left - room + 0.1, panel.middle[1], words, ha="center", upwards=True)
    cut = f"the first {MAX_ROWS} classes" if any(len(result.names) > MAX_ROWS + 1 for _, result in shown) else ""
    foot = "; ".join(filter(None, ["The shares of all sources sum to 1", cut, layers_left_out(len(results))]))
    write(figure, 0.1, 0.12, foot)
    return figure


def _names(result: RefinementResult, class_names: Sequence[str] | None) -> list[str]:
    """The names of the first sources."""
    names = result.names[:-1][:MAX_ROWS]
    if result.own and class_names is not None:
        names = tuple(class_name(label, class_names) for label in range(len(names)))
    return [short_name(name, 14) for name in names]


def _draw_heat_map(
    figure: "Figure",
    panel: Panel,
    values: Tensor,
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    below: str,
) -> None:
    """Draw shares as colours, with their scale in the title, because it differs between panels."""
    shown = values.double().numpy()
    if np.isfinite(shown).any():
        largest = float(np.nanmax(np.abs(shown))) or 1.0
        corner, size = (panel.left, panel.bottom), (panel.width, panel.height)
        draw_cells(figure, shown, corner, size, cmap=DIVERGING, vmin=-largest, vmax=largest)
        title += f"\nred {largest:.2g}, white 0, blue {-largest:.2g}"
    else:
        draw_lines(figure, [panel.outline])
        title += "\n(undefined: no training step yet,\nor no known sources)"
    write(figure, panel.left, panel.top + 0.05, title, va="bottom")
    cell, wide = panel.width / max(1, len(columns)), _widest(columns)
    for number in range(0, len(columns), 1 + int(0.13 / cell)):
        x = panel.left + (number + 0.5) * cell
        write(figure, x, panel.bottom - 0.04, columns[number], size=TICK, ha="center", va="top", upwards=wide > cell)
    cell = panel.height / max(1, len(rows))
    for number in range(0, len(rows), 1 + int(0.11 / cell)):
        write(figure, panel.left - 0.05, panel.top - (number + 0.5) * cell, rows[number], size=TICK, ha="right")
    depth = wide if wide > panel.width / max(1, len(columns)) else 0.12
    write(figure, panel.middle[0], panel.bottom - depth - 0.08, below, ha="center", va="top")


def _widest(names: Sequence[str]) -> float:
    return max((width_of(name, TICK) for name in names), default=0.0)


def plot_explanation(
    explanation: RefinementExplanation,
    sample: int = 0,
    *,
    predicted: int | None = None,
    class_names: Sequence[str] | None = None,
) -> "Figure":
    """Draw the contributions of the sources to the output of one sample as a ridge plot, and their shares by phase.

    A ridge is the density of the cosine between the contributions of a source (one per phase) and the refinement, each
    weighted by its norm. Contributions to the right drove the output to its value, those to the left worked against it.
    At most 20 sources are drawn, those with the largest contributions.

    Args:
        explanation: How a ledger divides the output on some samples.
        sample: Number of the sample.
        predicted: The source to highlight; default: the largest output, if the layer has one output per source.
        class_names: Names of the sources without "other", if they are classes; default: the names in the explanation.

    Returns:
        A matplotlib figure that is not registered with pyplot.
    """
    cosines = explanation.cosines()[:, :, sample].double().cpu().numpy()
    norms = explanation.norms()[:, :, sample].double().cpu().numpy()
    shares = explanation.shares()[:, :, sample].double().cpu()
    outputs = explanation.outputs[sample]
    names = explanation.sources
    if class_names is not None:
        names = (*(class_name(label, class_names) for label in range(len(names) - 1)), names[-1])
    if predicted is None and outputs.shape == (len(names) - 1,):
        predicted = int(outputs.argmax())
    largest = np.sort(np.argsort(-norms.sum(1), kind="stable")[:MAX_ROWS])
    labels, row = [short_name(names[source], 14) for source in largest], 0.3
    room, width, tall = 0.3 + _widest(labels), 2.6, row * len(largest)
    figure = new_figure(2 * room + width + 0.6 + _SIDE + 0.1, tall + 1.3)
    ridges = Panel(room, 0.65, width, tall, (-1, 1), (len(largest), 0))
    colors = [OTHER if source == predicted else VALUE for source in largest]
    grid = np.linspace(-1, 1, 201)
    density = (norms[..., None] * np.exp(-(((grid - cosines[..., None]) / BANDWIDTH) ** 2) / 2)).sum(1)
    density = density[largest] / (density.max() or 1.0)
    base = np.arange(1, len(largest) + 1)
    draw_lines(figure, [ridges.points([-1, 1], float(number)) for number in base], FAINT, 0.5, zorder=0)
    draw_lines(figure, [ridges.outline])
    draw_lines(figure, [ridges.points(0.0, [0, len(largest)])], NULL)
    outlines = [
        np.concatenate([ridges.points(grid, end - 0.9 * ridge), ridges.points([1, -1], float(end))])
        for end, ridge in zip(base, density, strict=True)
    ]
    draw_areas(figure, outlines, colors, alpha=0.75)
    for end, source, label, color in zip(base, largest, labels, colors, strict=True):
        write(figure, room - 0.05, ridges.y(end - 0.5), label, size=TICK, ha="right")
        write(figure, ridges.right + 0.05, ridges.y(end - 0.5), f"{float(shares[source].sum()):+.2f}", color=color)
    write(
        figure,
        ridges.middle[0],
        0.45,
        "-1: against        cosine with the refinement p        1: for it",
        size=TICK,
        ha="center",
        va="top",
    )
    write(figure, 0.1, ridges.middle[1], "source", ha="center", upwards=True)
    highlighted = "" if predicted is None else f"\n(orange: predicted, {names[predicted]})"
    title = f"contributions weighted by norm,\nand their shares{highlighted}"
    write(figure, room, ridges.top + 0.05, title, va="bottom")
    heat = Panel(ridges.right + 0.55 + room, 0.65, _SIDE, tall)
    phases = [str(phase + 1) for phase in range(shares.shape[1])]
    below = f"phase of training\n(residual of the sum {explanation.residual:.0e})"
    _draw_heat_map(figure, heat, shares[largest], "share by phase of training", labels, phases, below)
    more = len(cosines) - len(largest)
    write(figure, 0.1, 0.1, f"{more} more sources not drawn" if more else "")
    return figure
