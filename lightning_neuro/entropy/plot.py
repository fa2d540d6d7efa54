"""Figures of entropies, cheap enough to be drawn at every evaluation."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_neuro.entropy.result import EntropyResult
from lightning_neuro.figures import INK, NULL, PART, VALUE, first_panels, layers_left_out, new_figure, short_name

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    width, height = 3.3 * columns + 0.5, 2.8 * rows + 0.8
    figure = new_figure(width, height)
    panels = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=0.6 / width, right=1 - 0.15 / width, bottom=0.5 / height, top=1 - 0.85 / height, hspace=0.35, wspace=0.1
    )
    highest = max(max([result.max_bits, *result.total.tolist()]) for _, result in shown)
    for panel, (name, result) in zip(panels.flat, shown, strict=False):
        _draw(panel, name, result)
        panel.set_ylim(0, 1.05 * highest)
    for panel in panels.flat[len(shown) :]:
        panel.set_axis_off()
    bits = range(int(highest) + 1)
    for row in panels:  # ticks take most of the time of drawing: a few, set by hand, in the first column
        row[0].set_yticks(bits, [str(number) for number in bits], fontsize=7)
        row[0].set_ylabel("entropy (bits)", fontsize=8)
        for panel in row[1:]:
            panel.yaxis.set_visible(False)
    figure.text(0.5, 0.12 / height, "live units in descending order of entropy", ha="center", fontsize=8)
    if note := layers_left_out(len(results)):
        figure.text(0.99, 0.12 / height, note, ha="right", fontsize=8)
    _legend(figure, columns, [result for _, result in shown])
    return figure


def _draw(panel: "Axes", name: str, result: EntropyResult) -> None:
    """One layer: the live units sorted by entropy, as areas whose upper edge is the total."""
    order = result.total.argsort(descending=True)
    order = order[result.live[order]]
    live = len(order)
    # `y` is given so that matplotlib need not search for free space.
    panel.set_title(f"{short_name(name, 36)}\n{_subtitle(result)}", fontsize=8, y=1.01)
    if result.num_samples < 2 or not live:
        notes = result.notes()
        why = textwrap.fill(notes.get("undefined") or notes["dead"], 32)
        panel.text(0.5, 0.5, why, ha="center", va="center", fontsize=8, transform=panel.transAxes)
        panel.xaxis.set_visible(False)
        return
    panel.set_xticks([0, live], ["0", f"{live:,}"], fontsize=7)
    panel.set_xlim(0, live)
    edges = torch.arange(live + 1).numpy()
    top, middle = _steps(result.total[order]), 0 * edges
    if result.on_off is not None:
        middle = _steps(result.on_off[order])
        panel.fill_between(edges, middle, step="post", color=VALUE, lw=0)
    panel.fill_between(edges, middle, top, step="post", color=PART, lw=0)
    panel.axhline(result.max_bits, color=NULL, ls=":", lw=1)
    if result.class_information is not None:
        values = result.class_information[order].numpy()
        panel.plot(edges[:-1] + 0.5, values, ".", color=INK, ms=5 if live <= 64 else 1.5)


def _subtitle(result: EntropyResult) -> str:
    units = f"{result.num_units:,} unit" + "s" * (result.num_units != 1)
    samples = f"{result.num_samples:,} sample" + "s" * (result.num_samples != 1)
    if result.num_samples >= 2:
        units = f"{result.num_dead / result.num_units:.0%} of {units} dead"
    return f"{units}, {samples}" + (f", {result.mode}" if result.mode != "states" else "")


def _legend(figure: "Figure", columns: int, results: Sequence[EntropyResult]) -> None:
    """A legend of coloured words, in a tenth of the time of a matplotlib legend."""
    entries = [
        ("■ on/off entropy", VALUE, any(result.on_off is not None for result in results)),
        ("■ amplitude entropy", PART, True),
        ("● class information", INK, any(result.class_information is not None for result in results)),
        ("┄ maximum", NULL, True),
    ]
    width, height = figure.get_size_inches()
    for number, (text, color, _) in enumerate(entry for entry in entries if entry[-1]):
        row, column = (number // 2, number % 2) if columns == 1 else (0, number)
        x, y = (0.6 + 1.7 * column) / width, 1 - (0.2 + 0.17 * row) / height
        figure.text(x, y, text, color=color, fontsize=8)


def _steps(per_unit: Tensor) -> "np.ndarray[Any, Any]":
    """Heights for a step plot with a full-width last step."""
    return torch.cat([per_unit, per_unit[-1:]]).numpy()
