"""Figures of entropies, cheap enough to be drawn at every evaluation."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_neuro.entropy.result import EntropyResult
from lightning_neuro.figure_panels import Panel, draw_areas, draw_lines, draw_points, say, x_ticks, y_ticks
from lightning_neuro.figure_words import LEGEND_LINE, Entry, legend_places, wrapped, write, write_legend
from lightning_neuro.figures import (
    CARD,
    INK,
    NULL,
    PART,
    VALUE,
    first_panels,
    layers_left_out,
    new_figure,
    short_name,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDE, _TALL, _GAP, _LEFT = 2.75, 1.7, 0.2, 0.45  # inches
_TITLE, _TICKS, _TOP, _FOOT = 0.4, 0.2, 0.12, 0.25


def plot_entropy(results: Mapping[str, EntropyResult]) -> "Figure":
    """Draw the distribution of entropy over the units of each layer, a panel per layer (the first 8).

    A panel shows the live units in descending order of entropy. The blue area is the on/off entropy, the orange one
    above it the part that the amplitude adds, so its upper edge is the total; the dotted line is the maximum for this
    number of bins. Black points are the class information (if there are labels; negative values are not drawn): if it
    is far below the upper edge, most of the variation of the unit is unrelated to the class. A steep fall means that
    few units vary. In mode "mostafa2021" everything is orange: its entropy is that of the amplitude while active.

    Args:
        results: Layer name -> result of `neuron_entropy` or `NeuronEntropy.compute`.

    Returns:
        A matplotlib figure (Agg) that is not registered with pyplot, so it need not be closed.

    Raises:
        ValueError: If there is no result.

    Example:
        >>> import torch
        >>> from lightning_neuro.entropy import neuron_entropy, plot_entropy
        >>> figure = plot_entropy({"fc1": neuron_entropy(torch.randn(100, 20).relu())})
        >>> figure.savefig("entropy.png")  # doctest: +SKIP
    """
    shown, rows, columns = first_panels(results)
    width = max(_LEFT + columns * (_WIDE + _GAP), CARD)
    entries = _legend([result for _, result in shown])
    top = _TOP + LEGEND_LINE * (1 + max(line for _, line in legend_places(entries, 0.1, width)))
    height = rows * (_TITLE + _TALL + _TICKS) + _FOOT + top
    figure = new_figure(width, height)
    highest = 1.05 * max(max([result.max_bits, *result.total.tolist()]) for _, result in shown)
    panels = []
    for number, (_, result) in enumerate(shown):
        row, column = divmod(number, columns)
        bottom = height - top - (row + 1) * (_TITLE + _TALL + _TICKS) + _TICKS
        units = (0, max(1, int(result.live.sum())))
        panels.append(Panel(_LEFT + column * (_WIDE + _GAP), bottom, _WIDE, _TALL, units, (0, highest)))
        if column == 0:
            y_ticks(figure, panels[-1], {bits: str(bits) for bits in range(0, int(highest) + 1, 1 + int(highest) // 8)})
            write(figure, 0.13, bottom + _TALL / 2, "entropy (bits)", ha="center", upwards=True)
    draw_lines(figure, [panel.outline for panel in panels])
    for panel, (name, result) in zip(panels, shown, strict=True):
        _draw(figure, panel, name, result)
    foot = f"live units in descending order of entropy. {layers_left_out(len(results))}"
    write(figure, _LEFT, 0.12, foot.rstrip(". "))
    write_legend(figure, 0.1, height - 0.12, entries, width)
    return figure


def _draw(figure: "Figure", panel: Panel, name: str, result: EntropyResult) -> None:
    """One layer: the live units sorted by entropy, as areas whose upper edge is the total."""
    order = result.total.argsort(descending=True)
    order = order[result.live[order]]
    live = len(order)
    title = f"{short_name(name)}\n{_subtitle(result)}"
    write(figure, panel.left, panel.top + 0.05, title, va="bottom")
    if result.num_samples < 2 or not live:
        notes = result.notes()
        say(figure, panel, wrapped(notes.get("undefined") or notes["dead"], 0.9 * _WIDE))
        return
    x_ticks(figure, panel, {0: "0", live: f"{live:,}"})
    edges, top, middle = np.arange(live + 1), result.total[order].numpy(), np.zeros(live)
    areas, colors = [], []
    if result.on_off is not None:
        middle = result.on_off[order].numpy()
        areas, colors = [panel.area(edges, 0, middle)], [VALUE]
    draw_areas(figure, [*areas, panel.area(edges, middle, top)], [*colors, PART])
    draw_lines(figure, [panel.points([0, live], result.max_bits)], NULL, 1, linestyles=":")
    if result.class_information is not None:
        values = result.class_information[order].numpy()
        points = panel.points(edges[:-1] + 0.5, values)[values >= 0]
        draw_points(figure, points, ".", INK, 5 if live <= 64 else 1.5)


def _subtitle(result: EntropyResult) -> str:
    units = f"{result.num_units:,} unit" + "s" * (result.num_units != 1)
    samples = f"{result.num_samples:,} sample" + "s" * (result.num_samples != 1)
    if result.num_samples >= 2:
        units = f"{result.num_dead / result.num_units:.0%} of {units} dead"
    return f"{units}, {samples}" + (f", {result.mode}" if result.mode != "states" else "")


def _legend(results: Sequence[EntropyResult]) -> list[Entry]:
    entries = [
        ("■", VALUE, "on/off entropy", any(result.on_off is not None for result in results)),
        ("■", PART, "amplitude entropy", True),
        ("●", INK, "class information", any(result.class_information is not None for result in results)),
        ("┄", NULL, "maximum", True),
    ]
    return [entry[:3] for entry in entries if entry[3]]
