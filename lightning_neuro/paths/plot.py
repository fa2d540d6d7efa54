"""Figures of paths, cheap enough to be drawn at every evaluation."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_neuro import figures
from lightning_neuro.figures import class_name, first_panels, layers_left_out, new_figure, short_name
from lightning_neuro.paths.result import PathResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_TICKS = 20
MAX_LINES = 128
_CENTRED: dict[str, Any] = {"ha": "center", "fontsize": 8}


def plot_overlap(results: Mapping[str, PathResult], *, class_names: Sequence[str] | None = None) -> "Figure":
    """Draw how similar the paths of each two concepts are, a panel per layer (the first 8).

    Red: more units in common than random paths of their size, blue: fewer, white: as many. All panels have the concepts
    in the same order, by clustering of the mean over layers, so that similar concepts are neighbours. The title of each
    panel gives the mean over pairs and its noise floor, the similarity of paths from two halves of one concept's
    samples: an overlap at its noise floor means that the paths of different concepts cannot be distinguished.

    Args:
        results: Layer -> result.
        class_names: Names of the concepts.

    Returns:
        A matplotlib figure that is not registered with pyplot.

    Raises:
        ValueError: If there is no result.
    """
    order = _common_order(results) if results else torch.zeros(0).long()
    labels = [short_name(class_name(int(concept), class_names), 12) for concept in order]
    drawn: list[str] = []

    def draw(panel: "Axes", name: str, result: PathResult) -> Any:
        noise = result.self_overlap
        floor = "" if math.isnan(noise) else f", noise floor {noise:.2f}"
        panel.set_title(f"{name}, {result.num_units:,} units\noverlap {result.overlap:.2f}{floor}", fontsize=8, y=1.01)
        # Ticks take most of the time of drawing, and the order is the same in all panels.
        ticks = labels if not drawn and len(labels) <= MAX_TICKS else []
        drawn.append(name)
        panel.set_yticks(range(len(ticks)), ticks, fontsize=7)
        panel.set_xticks([])
        similarity = result.similarity[order][:, order].numpy()
        return panel.imshow(similarity, cmap=figures.DIVERGING, vmin=-1, vmax=1, interpolation="nearest")

    figure, images = _panels(results, draw, left=0.8, right=0.9, side=3.0)
    width, height = figure.get_size_inches()
    bar = figure.add_axes((1 - 0.65 / width, 0.6 / height, 0.12 / width, 1 - 1.3 / height))
    if images:
        figure.colorbar(images[0], cax=bar, ticks=[-1, 0, 1]).ax.set_yticklabels(["-1", "0", "1"], fontsize=7)
    bar.set_title("beyond\nchance", fontsize=7)
    figure.text(0.5, 0.1 / height, "concepts, similar ones together; 0: as random paths, 1: same path", **_CENTRED)
    return figure


def _common_order(results: Mapping[str, PathResult]) -> Tensor:
    """The concepts that have a path in any layer, in an order in which similar ones are neighbours."""
    concepts = torch.stack([result.defined for result in results.values()]).any(0).nonzero().flatten()
    mean = torch.stack([result.similarity for result in results.values()]).nanmean(0)
    return concepts[_clustered(mean[concepts][:, concepts])] if len(concepts) else concepts


def _clustered(similarity: Tensor) -> Tensor:
    """An order in which similar concepts are neighbours."""
    if len(similarity) < 3:
        return torch.arange(len(similarity))
    from scipy.cluster.hierarchy import leaves_list, linkage

    row, column = torch.triu_indices(len(similarity), len(similarity), 1)
    distance = 1 - similarity.nan_to_num(nan=0.0)[row, column]
    return torch.as_tensor(leaves_list(linkage(distance.numpy(), "average")).copy()).long()


def plot_flow(
    results: Mapping[str, PathResult],
    pair: Sequence[int] | None = None,
    *,
    class_names: Sequence[str] | None = None,
) -> "Figure":
    """Draw the path of one concept against that of another: a column of units per layer.

    The heights in each column are the fractions of the units that are in the first path (blue), in both (black), in the
    second (orange) and in neither (light grey); bands join the same part in consecutive layers. The more black, the
    more units the two concepts share. A grey line shows how far the black would reach for two random paths of their
    sizes.

    Args:
        results: Layer -> result, in the order of the forward pass.
        pair: The two concepts; default: the two whose paths are most similar over all layers.
        class_names: Names of the concepts.

    Returns:
        A matplotlib figure that is not registered with pyplot.
    """
    shown = list(results.items())
    figure = new_figure(max(5.0, 1.5 + 1.15 * len(shown)), 3.6)
    panel = figure.add_axes((0.09, 0.2, 0.89, 0.66))
    two = _most_similar(results) if pair is None else tuple(pair)
    if two is None or not shown or max(two) >= len(shown[0][1].masks):
        _say(panel, "two concepts with a path are needed")
        return figure
    colors = (figures.VALUE, figures.INK, figures.OTHER, figures.FAINT)
    edges = [_column(panel, number, result, two, colors) for number, (_, result) in enumerate(shown)]
    for number, (left, right) in enumerate(pairwise(edges)):
        for part, color in enumerate(colors[:3]):
            span = [number + 0.18, number + 0.82]
            low, high = [left[part], right[part]], [left[part + 1], right[part + 1]]
            panel.fill_between(span, low, high, color=color, alpha=0.25, lw=0)
    names = [f"{short_name(name, 14)}\n{result.num_units:,}" for name, result in shown]
    panel.set_xticks(range(len(shown)), names, fontsize=7)
    panel.set_yticks([0, 0.5, 1], ["0", ".5", "1"], fontsize=7)
    panel.set_xlim(-0.4, len(shown) - 0.6)
    panel.set_ylim(1, 0)
    panel.set_ylabel("fraction of the layer's units", fontsize=8)
    figure.text(0.5, 0.02, "layers and their numbers of units", **_CENTRED)
    first, second = (short_name(class_name(concept, class_names), 14) for concept in two)
    legend = (
        (f"■ only {first}", figures.VALUE),
        ("■ both (grey line: by chance)", figures.INK),
        (f"■ only {second}", figures.OTHER),
    )
    for place, (text, color) in zip((0.09, 0.33, 0.75), legend, strict=True):
        figure.text(place, 0.91, text, color=color, fontsize=8)
    return figure


def _column(
    panel: "Axes", number: int, result: PathResult, pair: tuple[int, ...], colors: Sequence[str]
) -> list[float]:
    """Draw the units of one layer; returns the edges of the four parts, from 0 to 1."""
    a, b = result.masks[pair[0]], result.masks[pair[1]]
    sizes = [float(part.double().mean()) for part in (a & ~b, a & b, ~a & b, ~a & ~b)]
    edges: list[float] = torch.tensor([0.0, *sizes]).cumsum(0).tolist()
    sides = [number - 0.18, number + 0.18]
    for low, high, color in zip(edges[:-1], edges[1:], colors, strict=True):
        panel.fill_between(sides, low, high, color=color, lw=0)
    chance = float(a.double().mean() * b.double().mean())
    if result.num_units <= MAX_LINES:  # so that each unit can be seen
        lines = torch.arange(1, result.num_units).numpy() / result.num_units
        panel.hlines(lines, *sides, color="white", lw=0.5)
    panel.plot(sides, [edges[1] + chance] * 2, color=figures.NULL, lw=2)
    return edges


def _most_similar(results: Mapping[str, PathResult]) -> tuple[int, int] | None:
    if not results:
        return None
    mean = torch.stack([result.similarity for result in results.values()]).nanmean(0)
    mean = mean.nan_to_num(nan=-2.0).triu(1) - 3 * torch.ones_like(mean).tril()
    if len(mean) < 2 or float(mean.max()) <= -2:
        return None
    where = int(mean.argmax())
    return where // len(mean), where % len(mean)


def plot_reuse(results: Mapping[str, PathResult]) -> "Figure":
    """Draw how many paths the units of each layer are in, a panel per layer (the first 8).

    Bars count units; the line is the expectation for random paths of the same sizes. Bars above it at both ends mean
    that some units are in many paths and others in none.

    Args:
        results: Layer -> result.

    Returns:
        A matplotlib figure that is not registered with pyplot.

    Raises:
        ValueError: If there is no result.
    """

    def draw(panel: "Axes", name: str, result: PathResult) -> None:
        paths = result.masks[result.defined]
        panel.set_title(f"{name}\n{result.num_units:,} units, {len(paths)} paths", fontsize=8, y=1.01)
        counts = torch.bincount(paths.sum(0), minlength=len(paths) + 1).double()
        expected = poisson_binomial(paths.double().mean(1)) * result.num_units
        places = torch.arange(len(counts)).numpy()
        panel.fill_between(places - 0.5, 0, counts.numpy(), step="post", color=figures.VALUE, lw=0)
        panel.fill_between([len(counts) - 1.5, len(counts) - 0.5], 0, float(counts[-1]), color=figures.VALUE, lw=0)
        panel.plot(places, expected.numpy(), color=figures.NULL, lw=1.2, marker="." if len(counts) < 30 else None, ms=4)
        highest = float(torch.cat([counts, expected]).max())
        panel.set_xlim(-0.5, len(counts) - 0.5)
        panel.set_ylim(0, 1.08 * max(highest, 1))
        panel.set_xticks([0, len(paths)], ["0", str(len(paths))], fontsize=7)
        panel.set_yticks([0, round(highest)], ["0", f"{round(highest):,}"], fontsize=7)

    figure, _ = _panels(results, draw, left=0.5, right=0.15, side=2.4)
    height = figure.get_size_inches()[1]
    figure.text(0.5, 0.1 / height, "paths that contain a unit  (■ units,  — if paths were random)", **_CENTRED)
    figure.text(0.005, 0.5, "units", rotation=90, va="center", fontsize=8)
    return figure


def poisson_binomial(probabilities: Tensor) -> Tensor:
    """The probabilities that 0, 1, ..., K of independent events happen, (K,) -> float64 (K + 1,)."""
    found = torch.ones(1, dtype=torch.float64)
    for probability in probabilities:
        stays, rises = found * (1 - probability), found * probability
        found = torch.cat([stays, stays.new_zeros(1)]) + torch.cat([rises.new_zeros(1), rises])
    return found


def plot_stability(history: Sequence[tuple[int, Mapping[str, float]]], layers: Sequence[str]) -> "Figure":
    """Draw the stability of the paths from one evaluation to the next, a line per layer.

    1: a class's path differs from its previous one no more than paths from two halves of its samples do; 0: as much as
    from another class's path.

    Args:
        history: Pairs of training step, and layer -> stability; from the second evaluation on.
        layers: The layers to draw (the first 8).

    Returns:
        A matplotlib figure that is not registered with pyplot.
    """
    from matplotlib import colormaps

    figure = new_figure(6.0, 3.2)
    panel = figure.add_axes((0.1, 0.16, 0.66, 0.74))
    panel.set_title("stability of the paths since the previous evaluation", fontsize=9, y=1.01)
    if not history:
        _say(panel, "available from the second evaluation on")
        return figure
    shown = list(layers)[: figures.MAX_PANELS]
    for number, layer in enumerate(shown):
        points = [(step, values[layer]) for step, values in history if layer in values]
        color = colormaps[figures.SCORE](number / len(shown))  # from dark to light with depth
        steps, values = zip(*points, strict=True) if points else ((), ())
        panel.plot(steps, values, color=color, lw=1.3, marker="o" if len(points) < 30 else None, ms=3)
        figure.text(0.78, 0.84 - 0.085 * number, f"— {short_name(layer, 22)}", color=color, fontsize=8)
    if note := layers_left_out(len(layers)):
        figure.text(0.99, 0.02, note, ha="right", fontsize=7)
    first, last = history[0][0], history[-1][0]
    panel.set_xlim(first - 0.5, max(last, first + 1) + 0.5)
    ticks = sorted({first, last})
    panel.set_xticks(ticks, [f"{step:,}" for step in ticks], fontsize=7)
    panel.set_ylim(-0.02, 1.02)
    panel.set_yticks([0, 0.5, 1], ["0", ".5", "1"], fontsize=7)
    figure.text(0.78, 0.2, "1: noise floor\n0: another class's path", fontsize=7, color=figures.INK)
    panel.set_xlabel("training step", fontsize=8)
    return figure


def _panels(
    results: Mapping[str, PathResult],
    draw: Callable[["Axes", str, PathResult], Any],
    *,
    left: float,
    right: float,
    side: float,
) -> tuple["Figure", list[Any]]:
    """A figure with a panel per layer, and what `draw` returned for each layer that has a path."""
    shown, rows, columns = first_panels(results)
    width, height = side * columns + left + right, (side + 0.4) * rows + 0.6
    figure = new_figure(width, height)
    panels = figure.subplots(rows, columns, squeeze=False)
    sides = {"left": left / width, "right": 1 - right / width, "bottom": 0.5 / height, "top": 1 - 0.5 / height}
    figure.subplots_adjust(**sides, hspace=0.4, wspace=0.25)
    drawn = []
    for panel, (name, result) in zip(panels.flat, shown, strict=False):
        if result.defined.any():
            drawn.append(draw(panel, short_name(name, 30), result))
        else:
            panel.set_title(short_name(name, 30), fontsize=8)
            _say(panel, "no concept has a path")
    for panel in panels.flat[len(shown) :]:
        panel.set_axis_off()
    if note := layers_left_out(len(results)):
        figure.text(0.99, 0.1 / height, note, ha="right", fontsize=8)
    return figure, drawn


def _say(panel: "Axes", text: str) -> None:
    panel.text(0.5, 0.5, text, ha="center", va="center", fontsize=8, transform=panel.transAxes)
    panel.set_xticks([])
    panel.set_yticks([])
