"""Figures of paths, cheap enough to be drawn at every evaluation."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_neuro.paths.result import PathResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PANELS = 8
MAX_TICKS = 20
MAX_LINES = 128
_FIRST, _BOTH, _SECOND, _NONE = "#0077bb", "#222222", "#ee7733", "#dddddd"
_CHANCE = "#ffdd00"
_LINES = ("#0077bb", "#ee7733", "#009988", "#cc3311", "#33bbee", "#ee3377", "#bbbbbb", "#222222")


def plot_overlap(results: Mapping[str, PathResult]) -> "Figure":
    """Draw how alike the paths of each two concepts are, a panel per layer (the first 8).

    Red: more units in common than random paths of their size, blue: fewer, white: as many. All panels have the concepts
    in one order, by clustering of the mean over layers, so that like stands beside like. Above each panel the mean over
    pairs and its noise floor, what two halves of one concept's samples have in common: an overlap at its noise floor
    means that the paths are not told apart.

    Args:
        results: Layer -> result.

    Returns:
        A matplotlib figure that pyplot does not know.

    Raises:
        ValueError: If there is no result.
    """
    defined = torch.stack([result.defined for result in results.values()]).any(0) if results else torch.zeros(0)
    concepts = defined.nonzero().flatten()
    mean = torch.stack([result.similarity for result in results.values()]).nanmean(0) if results else torch.zeros(0, 0)
    order = concepts[_clustered(mean[concepts][:, concepts])] if len(concepts) else concepts

    labelled: list[str] = []

    def draw(panel: "Axes", name: str, result: PathResult) -> Any:
        noise = result.self_overlap
        floor = "" if noise != noise else f", noise floor {noise:.2f}"
        panel.set_title(f"{name}, {result.num_units:,} units\noverlap {result.overlap:.2f}{floor}", fontsize=8, y=1.01)
        # Ticks are the dear part of a figure, and the order is the same in all panels.
        first = len(labelled) == 0 and len(order) <= MAX_TICKS
        labels = [str(int(concept)) for concept in order] if first else []
        labelled.append(name)
        panel.set_yticks(range(len(labels)), labels, fontsize=7)
        panel.set_xticks([])
        similarity = result.similarity[order][:, order].numpy()
        return panel.imshow(similarity, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")

    figure, images = _panels(results, draw, right=0.9, side=3.0)
    width, height = figure.get_size_inches()
    bar = figure.add_axes((1 - 0.65 / width, 0.6 / height, 0.12 / width, 1 - 1.3 / height))
    if images:
        figure.colorbar(images[0], cax=bar, ticks=[-1, 0, 1]).ax.set_yticklabels(["-1", "0", "1"], fontsize=7)
    bar.set_title("beyond\nchance", fontsize=7)
    figure.text(0.5, 0.1 / height, "concepts, like beside like; 0: as random paths, 1: same path", **_CENTRED)
    return figure


def _clustered(similarity: Tensor) -> Tensor:
    """An order of the concepts in which like stands beside like."""
    if len(similarity) < 3:
        return torch.arange(len(similarity))
    from scipy.cluster.hierarchy import leaves_list, linkage

    row, column = torch.triu_indices(len(similarity), len(similarity), 1)
    distance = 1 - similarity.nan_to_num(nan=0.0)[row, column]
    return torch.as_tensor(leaves_list(linkage(distance.numpy(), "average")).copy()).long()


def plot_flow(results: Mapping[str, PathResult], pair: Sequence[int] | None = None) -> "Figure":
    """Draw the way of one concept against that of another: a column of units per layer.

    In each column the units of the first path (blue), of both (black), of the second (orange) and of neither (grey), a
    height for each share; bands join the same share in neighbouring layers. Where black takes the place of blue and
    orange, the two concepts go one way. A yellow line says how far the black would reach for two random paths of their
    sizes.

    Args:
        results: Layer -> result, in the order in which data pass the layers.
        pair: The two concepts; default: the two whose paths are most alike over all layers.

    Returns:
        A matplotlib figure that pyplot does not know.
    """
    shown = list(results.items())
    figure = _figure(max(5.0, 1.5 + 1.15 * len(shown)), 3.6)
    panel = figure.add_axes((0.09, 0.2, 0.89, 0.66))
    two = _most_alike(results) if pair is None else tuple(pair)
    known = two is not None and shown and max(two) < len(shown[0][1].masks)
    if two is None or not known:
        _say(panel, "two concepts are needed, each with a path")
        return figure
    first, second = two
    colors = (_FIRST, _BOTH, _SECOND, _NONE)
    edges = []
    for number, (_, result) in enumerate(shown):
        a, b = result.masks[first], result.masks[second]
        sizes = [float(part.double().mean()) for part in (a & ~b, a & b, ~a & b, ~a & ~b)]
        tops = torch.tensor([0.0, *sizes]).cumsum(0).tolist()
        edges.append(tops)
        for low, high, color in zip(tops[:-1], tops[1:], colors, strict=True):
            panel.fill_between([number - 0.18, number + 0.18], low, high, color=color, lw=0)
        chance = float(a.double().mean() * b.double().mean())
        if result.num_units <= MAX_LINES:  # each unit to be seen
            lines = torch.arange(1, result.num_units).numpy() / result.num_units
            panel.hlines(lines, number - 0.18, number + 0.18, color="white", lw=0.5)
        panel.plot([number - 0.18, number + 0.18], [tops[1] + chance] * 2, color=_CHANCE, lw=2)
    for number, (left, right) in enumerate(pairwise(edges)):
        for part, color in enumerate(colors[:3]):
            span = [number + 0.18, number + 0.82]
            low, high = [left[part], right[part]], [left[part + 1], right[part + 1]]
            panel.fill_between(span, low, high, color=color, alpha=0.25, lw=0)
    names = [f"{_short(name)}\n{result.num_units:,}" for name, result in shown]
    panel.set_xticks(range(len(shown)), names, fontsize=7)
    panel.set_yticks([0, 0.5, 1], ["0", ".5", "1"], fontsize=7)
    panel.set_xlim(-0.4, len(shown) - 0.6)
    panel.set_ylim(1, 0)
    panel.set_ylabel("share of the layer's units", fontsize=8)
    figure.text(0.5, 0.02, "layers, and their numbers of units", **_CENTRED)
    legend = ((f"■ only {first}", _FIRST), ("■ both (yellow line: by chance)", _BOTH), (f"■ only {second}", _SECOND))
    for place, (text, color) in zip((0.09, 0.3, 0.75), legend, strict=True):
        figure.text(place, 0.91, text, color=color, fontsize=8)
    return figure


def _most_alike(results: Mapping[str, PathResult]) -> tuple[int, int] | None:
    if not results:
        return None
    mean = torch.stack([result.similarity for result in results.values()]).nanmean(0)
    mean = mean.nan_to_num(nan=-2.0).triu(1) - 3 * torch.ones_like(mean).tril()
    if len(mean) < 2 or float(mean.max()) <= -2:
        return None
    where = int(mean.argmax())
    return where // len(mean), where % len(mean)


def plot_reuse(results: Mapping[str, PathResult]) -> "Figure":
    """Draw in how many paths the units of each layer are, a panel per layer (the first 8).

    Bars count units; the line is what paths of the same size would give that took their units at random. Bars above it
    at both ends mean that some units serve many concepts and others none.

    Args:
        results: Layer -> result.

    Returns:
        A matplotlib figure that pyplot does not know.

    Raises:
        ValueError: If there is no result.
    """

    def draw(panel: "Axes", name: str, result: PathResult) -> None:
        paths = result.masks[result.defined]
        panel.set_title(f"{name}\n{result.num_units:,} units, {len(paths)} paths", fontsize=8, y=1.01)
        counts = torch.bincount(paths.sum(0), minlength=len(paths) + 1).double()
        expected = _poisson_binomial(paths.double().mean(1)) * result.num_units
        places = torch.arange(len(counts)).numpy()
        panel.fill_between(places - 0.5, 0, counts.numpy(), step="post", color=_FIRST, lw=0)
        panel.fill_between([len(counts) - 1.5, len(counts) - 0.5], 0, float(counts[-1]), color=_FIRST, lw=0)
        panel.plot(places, expected.numpy(), color=_BOTH, lw=1.2, marker="." if len(counts) < 30 else None, ms=4)
        highest = float(torch.cat([counts, expected]).max())
        panel.set_xlim(-0.5, len(counts) - 0.5)
        panel.set_ylim(0, 1.08 * max(highest, 1))
        panel.set_xticks([0, len(paths)], ["0", str(len(paths))], fontsize=7)
        panel.set_yticks([0, round(highest)], ["0", f"{round(highest):,}"], fontsize=7)

    figure, _ = _panels(results, draw, right=0.15, side=2.4)
    height = figure.get_size_inches()[1]
    figure.text(0.5, 0.1 / height, "paths that a unit is in  (■ units,  — if paths were random)", **_CENTRED)
    figure.text(0.005, 0.5, "units", rotation=90, va="center", fontsize=8)
    return figure


def _poisson_binomial(shares: Tensor) -> Tensor:
    """The chances that 0, 1, ..., K of independent events happen."""
    chances = torch.ones(1, dtype=torch.float64)
    for share in shares:
        stays, rises = chances * (1 - share), chances * share
        chances = torch.cat([stays, stays.new_zeros(1)]) + torch.cat([rises.new_zeros(1), rises])
    return chances


def plot_stability(history: Sequence[tuple[int, Mapping[str, float]]], layers: Sequence[str]) -> "Figure":
    """Draw what has stayed of the paths from one evaluation to the next, a line per layer.

    1: a class's path differs from its earlier one no more than two halves of its samples do; 0: as much as from another
    class's path.

    Args:
        history: Step of the training, and layer -> stability; from the second evaluation on.
        layers: Which lines to draw (the first 8).

    Returns:
        A matplotlib figure that pyplot does not know.
    """
    figure = _figure(6.0, 3.2)
    panel = figure.add_axes((0.1, 0.16, 0.66, 0.74))
    panel.set_title("stability of the paths since the evaluation before", fontsize=9, y=1.01)
    if not history:
        _say(panel, "known from the second evaluation on")
        return figure
    for number, layer in enumerate(list(layers)[:MAX_PANELS]):
        points = [(step, values[layer]) for step, values in history if layer in values]
        color = _LINES[number % len(_LINES)]
        steps, values = zip(*points, strict=True) if points else ((), ())
        panel.plot(steps, values, color=color, lw=1.3, marker="o" if len(points) < 30 else None, ms=3)
        figure.text(0.78, 0.84 - 0.085 * number, f"— {_short(layer, 22)}", color=color, fontsize=8)
    first, last = history[0][0], history[-1][0]
    panel.set_xlim(first - 0.5, max(last, first + 1) + 0.5)
    ticks = sorted({first, last})
    panel.set_xticks(ticks, [f"{step:,}" for step in ticks], fontsize=7)
    panel.set_ylim(-0.02, 1.02)
    panel.set_yticks([0, 0.5, 1], ["0", ".5", "1"], fontsize=7)
    figure.text(0.78, 0.2, "1: noise floor\n0: another class's path", fontsize=7, color="0.3")
    panel.set_xlabel("training step", fontsize=8)
    return figure


def free(figure: "Figure") -> None:
    """Let go of a figure's parts and pixels, once it is written; nothing can be done with it any more."""
    # Not `clear`, which makes new axes that refer to each other.
    for part in figure.findobj():
        vars(part).clear()


_CENTRED: dict[str, Any] = {"ha": "center", "fontsize": 8}


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100)
    FigureCanvasAgg(figure)
    return figure


def _panels(
    results: Mapping[str, PathResult],
    draw: Callable[["Axes", str, PathResult], Any],
    *,
    right: float,
    side: float,
) -> tuple["Figure", list[Any]]:
    """A figure with a panel per layer, and what `draw` returned for each that has a path."""
    if not results:
        raise ValueError("results must hold at least one layer, got none.")
    shown = list(results.items())[:MAX_PANELS]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    width, height = side * columns + right + 0.5, (side + 0.4) * rows + 0.6
    figure = _figure(width, height)
    panels = figure.subplots(rows, columns, squeeze=False)
    sides = {"left": 0.5 / width, "right": 1 - right / width, "bottom": 0.5 / height, "top": 1 - 0.5 / height}
    figure.subplots_adjust(**sides, hspace=0.4, wspace=0.25)
    drawn = []
    for panel, (name, result) in zip(panels.flat, shown, strict=False):
        if result.defined.any():
            drawn.append(draw(panel, _short(name, 30), result))
        else:
            panel.set_title(_short(name, 30), fontsize=8)
            _say(panel, "no concept has a path here")
    for panel in panels.flat[len(shown) :]:
        panel.set_axis_off()
    if len(results) > len(shown):
        note = f"the first {len(shown)} of {len(results)} layers"
        figure.text(0.99, 0.1 / height, note, ha="right", fontsize=8)
    return figure, drawn


def _say(panel: "Axes", text: str) -> None:
    panel.text(0.5, 0.5, text, ha="center", va="center", fontsize=8, transform=panel.transAxes)
    panel.set_xticks([])
    panel.set_yticks([])


def _short(name: str, length: int = 14) -> str:
    return name if len(name) <= length else f"…{name[1 - length :]}"
