"""Figures of entropies, cheap enough to be drawn at every evaluation."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_neuro.entropy.result import EntropyResult

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PANELS = 8
_ON_OFF, _AMPLITUDE, _CLASS, _LIMIT = "#4477aa", "#c4a800", "black", "0.3"


def plot_entropy(results: Mapping[str, EntropyResult]) -> "Figure":
    """Draw how the entropy of each layer is spread over its units, a panel per layer (the first 8).

    A panel shows the live units from the one of highest entropy to the one of lowest. The blue area is the on/off
    entropy, the yellow one above it the part that the amplitude adds, so its top edge is the total; the dotted line is
    the most that so many bins can hold. Black points are the bits that tell the classes apart (where there are labels;
    a correction below 0 is not drawn): far below the top edge means that most of what the unit does has nothing to do
    with the class. A steep fall says that few units vary. In mode "mostafa2021" all is yellow: its entropy is that of
    the amplitude while active.

    Args:
        results: Layer name -> result of `neuron_entropy` or `NeuronEntropy.compute`.

    Returns:
        A matplotlib figure, drawn by Agg and not known to pyplot, so there is nothing to close.

    Raises:
        ValueError: If there is no result.

    Example:
        >>> import torch
        >>> from lightning_neuro.entropy import neuron_entropy, plot_entropy
        >>> figure = plot_entropy({"fc1": neuron_entropy(torch.randn(100, 20).relu())})
        >>> figure.savefig("entropy.png")  # doctest: +SKIP
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not results:
        raise ValueError("results must hold at least one layer, got none.")
    shown = list(results.items())[:MAX_PANELS]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    width, height = 3.3 * columns + 0.5, 2.8 * rows + 0.8
    figure = Figure(figsize=(width, height), dpi=100)
    FigureCanvasAgg(figure)
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
    for row in panels:  # ticks are the dear part of a figure: a few, set by hand, in the first column
        row[0].set_yticks(bits, [str(number) for number in bits], fontsize=7)
        row[0].set_ylabel("entropy (bits)", fontsize=8)
        for panel in row[1:]:
            panel.yaxis.set_visible(False)
    figure.text(0.5, 0.12 / height, "live units, the one of highest entropy first", ha="center", fontsize=8)
    if len(results) > len(shown):
        figure.text(0.99, 0.12 / height, f"the first {len(shown)} of {len(results)} layers", ha="right", fontsize=8)
    _legend(figure, columns, [result for _, result in shown])
    return figure


def _draw(panel: "Axes", name: str, result: EntropyResult) -> None:
    """One layer: the live units sorted by entropy, as areas whose top edge is the total."""
    order = result.total.argsort(descending=True)
    order = order[result.live[order]]
    live = len(order)
    # y is given so that matplotlib need not search for a free place
    panel.set_title(f"{name}\n{_subtitle(result)}", fontsize=8, y=1.01)
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
        panel.fill_between(edges, middle, step="post", color=_ON_OFF, lw=0)
    panel.fill_between(edges, middle, top, step="post", color=_AMPLITUDE, lw=0)
    panel.axhline(result.max_bits, color=_LIMIT, ls=":", lw=1)
    if result.class_information is not None:
        values = result.class_information[order].numpy()
        panel.plot(edges[:-1] + 0.5, values, ".", color=_CLASS, ms=5 if live <= 64 else 1.5)


def _subtitle(result: EntropyResult) -> str:
    units = f"{result.num_units:,} unit" + "s" * (result.num_units != 1)
    samples = f"{result.num_samples:,} sample" + "s" * (result.num_samples != 1)
    if result.num_samples >= 2:
        units = f"{result.num_dead / result.num_units:.0%} of {units} dead"
    return f"{units}, {samples}" + (f", {result.mode}" if result.mode != "correlation" else "")


def _legend(figure: "Figure", columns: int, results: Sequence[EntropyResult]) -> None:
    """Coloured words: a tenth of the time of a matplotlib legend."""
    entries = [
        ("■ on/off entropy", _ON_OFF, any(result.on_off is not None for result in results)),
        ("■ amplitude entropy", _AMPLITUDE, True),
        ("● class information", _CLASS, any(result.class_information is not None for result in results)),
        ("┄ maximum", _LIMIT, True),
    ]
    width, height = figure.get_size_inches()
    for number, (text, color, _) in enumerate(entry for entry in entries if entry[-1]):
        row, column = (number // 2, number % 2) if columns == 1 else (0, number)
        x, y = (0.6 + 1.7 * column) / width, 1 - (0.2 + 0.17 * row) / height
        figure.text(x, y, text, color=color, fontsize=8)


def _steps(per_unit: Tensor) -> "np.ndarray[Any, Any]":
    """Heights for a step plot with a full-width last step."""
    return torch.cat([per_unit, per_unit[-1:]]).numpy()
