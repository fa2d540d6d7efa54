"""Figures: which sources shaped the output of a layer, on average over the probe set and for single inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

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
_SIDE = 1.8  # inches: side of the heat map of an explanation
_CARD = 3.3  # inches: width of a card of TensorBoard


def plot_refinement(results: Mapping[str, RefinementResult], class_names: Sequence[str] | None = None) -> "Figure":
    """Draw two heat maps per layer: the shares of each class of training samples, by explained class and by phase.

    Rows are classes of training samples. On the left, the absolute values of a column sum to 1: who set the samples of
    this class apart. On the right, those of a row sum to 1: when the class did so. Red is for what the samples have
    become, blue against it. All maps have one scale, that of the bar. Phases that have not begun are not drawn.

    Args:
        results: Layer -> result.
        class_names: Names of the classes, if the sources are the classes; default: the names in the results.

    Returns:
        A matplotlib figure that is not registered with pyplot, as wide as a card of TensorBoard.
    """
    shown, rows, _ = first_panels(results, max_columns=1)
    labels = [_names(result, class_names) for _, result in shown]
    widest = max(map(_widest, labels))
    maps = [_shown_shares(result, len(names)) for (_, result), names in zip(shown, labels, strict=True)]
    known = [np.abs(values[np.isfinite(values)]) for pair in maps for values in pair]
    limit = max(0.1, float(np.ceil(max((part.max() for part in known if part.size), default=0.0) * 10) / 10))
    room, below = 0.32 + widest, 0.32 + widest
    left_side = 0.6 * (_CARD - room - 0.25)
    tall = 0.6 + left_side + below
    height = rows * tall + 0.5
    figure = new_figure(_CARD, height)
    for row, ((layer, result), names, (by_class, by_phase)) in enumerate(zip(shown, labels, maps, strict=True)):
        left = Panel(room, height - (row + 1) * tall + below, left_side, left_side)
        right = replace(left, left=left.right + 0.15, width=_CARD - 0.1 - left.right - 0.15)
        write(figure, 0.05, left.top + 0.54, short_name(layer, 40), size=9, va="top", bold=True)
        write(figure, 0.05, left.top + 0.38, _in_words(result), va="top")
        phases = [str(phase + 1) for phase in range(by_phase.shape[1])]
        for panel, values, columns, words, turned in (
            (left, by_class, names, "explained class", True),
            (right, by_phase, phases, "phase", False),
        ):
            _draw_map(figure, panel, values, limit)
            _name_columns(figure, panel, columns, turned=turned)
            depth = (widest if turned else 0.12) + 0.08
            write(figure, panel.middle[0], panel.bottom - depth, words, ha="center", va="top")
        _name_rows(figure, left, names)
        write(figure, 0.1, left.middle[1], "class of training samples", ha="center", upwards=True)
    _draw_bar(figure, Panel(1.0, 0.3, _CARD - 2.0, 0.1), limit)
    cut = f"the first {MAX_ROWS} classes" if any(len(result.names) > MAX_ROWS + 1 for _, result in shown) else ""
    write(figure, 0.05, 0.1, "; ".join(filter(None, [cut, layers_left_out(len(results))])))
    return figure


def _shown_shares(result: RefinementResult, count: int) -> tuple[Any, Any]:
    """The shares by explained class, (training class, explained class), and by phase, (training class, phase)."""
    by_phase = result.phase_shares[:count].double()
    by_phase = by_phase / by_phase.abs().sum(1, keepdim=True)
    return result.shares[:-1][:count, :count].T.double().numpy(), by_phase.numpy()


def _in_words(result: RefinementResult) -> str:
    if not np.isfinite(result.shares[:-1].numpy()).any():
        return "undefined: no training step yet,\nor no known classes"
    own = f"own class {result.own_class_share:.2f} (shuffled labels {result.own_class_share_null:.2f})\n"
    return f"{own if result.own else ''}common to all samples, not shown: {result.common_share:.0%}"


def _draw_map(figure: "Figure", panel: Panel, values: Any, limit: float) -> None:
    if np.isfinite(values).any():
        size = (panel.width, panel.height)
        draw_cells(figure, values, (panel.left, panel.bottom), size, cmap=DIVERGING, vmin=-limit, vmax=limit)
    else:
        draw_lines(figure, [panel.outline])


def _draw_bar(figure: "Figure", panel: Panel, limit: float) -> None:
    """A colour bar with the ends of the scale."""
    colors = np.linspace(-limit, limit, 101)[None]
    size = (panel.width, panel.height)
    draw_cells(figure, colors, (panel.left, panel.bottom), size, cmap=DIVERGING, vmin=-limit, vmax=limit)
    write(figure, panel.left - 0.08, panel.middle[1], f"against  {-limit:.1f}", ha="right")
    write(figure, panel.right + 0.08, panel.middle[1], f"{limit:.1f}  for it")
    write(figure, panel.middle[0], panel.bottom - 0.03, "share", ha="center", va="top")


def _name_columns(figure: "Figure", panel: Panel, names: Sequence[str], *, turned: bool) -> None:
    cell = panel.width / max(1, len(names))
    for number in range(0, len(names), 1 + int(0.13 / cell)):
        x = panel.left + (number + 0.5) * cell
        write(figure, x, panel.bottom - 0.04, names[number], size=TICK, ha="center", va="top", upwards=turned)


def _name_rows(figure: "Figure", panel: Panel, names: Sequence[str]) -> None:
    cell = panel.height / max(1, len(names))
    for number in range(0, len(names), 1 + int(0.11 / cell)):
        write(figure, panel.left - 0.05, panel.top - (number + 0.5) * cell, names[number], size=TICK, ha="right")


def _names(result: RefinementResult, class_names: Sequence[str] | None) -> list[str]:
    """The names of the first sources."""
    names = result.names[:-1][:MAX_ROWS]
    if result.own and class_names is not None:
        names = tuple(class_name(label, class_names) for label in range(len(names)))
    return [short_name(name, 10) for name in names]


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
    wide = _widest(columns)
    _name_columns(figure, panel, columns, turned=wide > panel.width / max(1, len(columns)))
    _name_rows(figure, panel, rows)
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
    begun = 1 + max(np.flatnonzero(norms.any(0)), default=norms.shape[1] - 1)  # training may end before the last phase
    shares = shares[:, :begun]
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
