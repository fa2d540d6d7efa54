"""Figure of a family's curves, with a name for each line: TensorBoard gives all lines of a card the same colour."""

from collections.abc import Mapping, Sequence
from math import log10
from typing import TYPE_CHECKING

import numpy as np

from lightning_neuro import figures
from lightning_neuro.figure_panels import Panel, draw_lines, draw_points, x_ticks, y_ticks
from lightning_neuro.figure_words import LEGEND_LINE, Entry, legend_places, wrapped, write, write_legend
from lightning_neuro.keys import Entry as Measured
from lightning_neuro.keys import key_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH, _LEFT, _TALL, _SIDE, _ABOVE = 3.4, 0.55, 0.95, 0.1, 0.28  # inches
_FURTHER = (figures.OTHER, figures.PART, figures.INK)
_FEW_POINTS = 40


def plot_curves(
    title: str, measures: Sequence[str], history: Mapping[str, Sequence[tuple[int, float]]], name: str
) -> "Figure":
    """Draw some measures of each layer (the first 8) against the training step, on one scale.

    Blue: the measure; grey: its value by chance or its lower bound (`..._null`, `..._low`); green,
    dashed: its value before training.

    Args:
        title: What the measures have in common.
        measures: The measures, the main one first.
        history: Key -> training step and value at each evaluation.
        name: First part of the keys.

    Returns:
        A matplotlib figure that is not registered with pyplot.
    """
    layers = _layers(measures, history, name)
    shown = layers[: figures.MAX_PANELS]
    styles = styles_of(measures)
    entries: list[Entry] = [("━", color, measure) for measure, (color, _) in styles.items()]
    legend = 1 + max((line for _, line in legend_places(entries, _SIDE, _WIDTH)), default=0)
    title = wrapped(title, _WIDTH - 2 * _SIDE, 9)
    head = 0.25 + 0.15 * title.count("\n") + LEGEND_LINE * legend
    height = head + len(shown) * (_ABOVE + _TALL) + 0.42
    figure = figures.new_figure(_WIDTH, height)
    write(figure, _SIDE, height - 0.06, title, size=9, va="top")
    write_legend(figure, _SIDE, height - head + LEGEND_LINE * (legend - 0.5), entries, _WIDTH)
    lines = {
        (layer, measure): np.array(history[key], dtype=float).reshape(-1, 2)
        for layer in shown
        for measure in measures
        if (key := key_of(name, Measured(measure, layer))) in history
    }
    every = np.concatenate([np.zeros((0, 2)), *lines.values()])
    steps = (float(every[:, 0].min(initial=np.inf)), float(every[:, 0].max(initial=-np.inf)))
    low, high = _rounded(float(every[:, 1].min(initial=np.inf)), float(every[:, 1].max(initial=-np.inf)))
    panel = Panel(_LEFT, 0, _WIDTH - _LEFT - _SIDE, _TALL, _widened(*steps), (low, high))
    for number, layer in enumerate(shown):
        bottom = height - head - (number + 1) * (_ABOVE + _TALL)
        place = Panel(panel.left, bottom, panel.width, panel.height, panel.x_range, panel.y_range)
        write(figure, place.left, place.top + 0.04, figures.short_name(layer, 40), va="bottom", bold=True)
        zero = [place.points(place.x_range, 0.0)] if low < 0 < high else []
        draw_lines(figure, [place.outline, *zero], figures.FAINT)
        y_ticks(figure, place, {value: _number(value, high - low) for value in (low, high)})
        for measure, (color, dashes) in styles.items():
            if (layer, measure) not in lines:
                continue
            points = place.points(*lines[layer, measure].T)
            draw_lines(figure, [points], color, 1.5, linestyles=dashes)
            if len(points) < _FEW_POINTS and dashes == "-":
                draw_points(figure, points, "o", color, 2.5)
        if number == len(shown) - 1:
            x_ticks(figure, place, {step: f"{step:,.0f}" for step in steps})
            write(figure, place.middle[0], place.bottom - 0.3, "training step", ha="center")
    write(figure, _WIDTH - 0.05, 0.08, figures.layers_left_out(len(layers)), size=7, ha="right")
    return figure


def styles_of(measures: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Measure -> colour and style of its line."""
    found, further = {}, iter(_FURTHER * len(measures))
    for number, measure in enumerate(measures):
        if number == 0:
            found[measure] = (figures.VALUE, "-")
        elif measure.endswith(("_null", "_low")) or measure == "self_overlap":
            found[measure] = (figures.NULL, "-")
        elif measure.endswith("_initial"):
            found[measure] = (figures.INITIAL, "--")
        else:
            found[measure] = (next(further), "-")
    return found


def _layers(measures: Sequence[str], history: Mapping[str, object], name: str) -> list[str]:
    """The layers for which the main measure is known, in the order of its keys."""
    start = f"{name}/{measures[0]}/"
    return [key.removeprefix(start) for key in history if key.startswith(start)]


def _widened(low: float, high: float) -> tuple[float, float]:
    spare = 0.02 * (high - low) or 1.0
    return low - spare, high + spare


def _rounded(low: float, high: float) -> tuple[float, float]:
    """Limits of a scale that hold both, with few digits; from 0 if that costs little room."""
    if high - low <= 1e-6 * max(abs(low), abs(high), 1e-3):  # constant
        low, high = (0.0, 1.0) if abs(low) < 1e-6 else (min(0.0, 2 * low), max(0.0, 2 * high))
    if low > 0 and low < 0.5 * high:
        low = 0.0
    unit = 10 ** np.floor(log10(max(high - low, 1e-6))) / 2
    low, high = float(np.floor(low / unit) * unit), float(np.ceil(high / unit) * unit)
    return (low, high) if high > low else (low - unit, high + unit)


def _number(value: float, span: float) -> str:
    if span < 1e-3:
        return f"{value:.0e}" if value else "0"
    digits = max(0, 1 - int(np.floor(log10(span))))
    return f"{value:,.{digits}f}"
