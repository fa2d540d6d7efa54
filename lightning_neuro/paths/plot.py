"""Figures of paths, cheap enough to be drawn at every evaluation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lightning_neuro import figures
from lightning_neuro.figure_panels import (
    TICK,
    Panel,
    draw_areas,
    draw_cells,
    draw_lines,
    draw_points,
    say,
    x_ticks,
    y_ticks,
)
from lightning_neuro.figure_words import width_of, wrapped, write, write_legend
from lightning_neuro.figures import class_name, first_panels, layers_left_out, new_figure, short_name
from lightning_neuro.paths.result import PathResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_TICKS = 20
MAX_LINES = 128
MAX_COLUMNS = 16
MAX_CONCEPTS = 180  # one pixel each


def plot_overlap(
    results: Mapping[str, PathResult], *, class_names: Sequence[str] | None = None, order: Tensor | None = None
) -> "Figure":
    """Draw how similar the paths of each two concepts (the first 180) are, a panel per layer (the first 8).

    Red: more units in common than random paths of their size, blue: fewer, white: as many. All panels have the concepts
    in the same order, by clustering of the mean over layers, so that similar concepts are neighbours. The title of each
    panel gives the mean over pairs and its upper limit, the similarity of paths from two halves of one concept's
    samples: an overlap at its upper limit means that the paths of different concepts cannot be distinguished.

    Args:
        results: Layer -> result.
        class_names: Names of the concepts.
        order: int64, the concepts in the order in which they are drawn; default: `common_order(results)`.

    Returns:
        A matplotlib figure that is not registered with pyplot.

    Raises:
        ValueError: If there is no result.
    """
    if order is None:
        order = common_order(results) if results else torch.zeros(0).long()
    labels = [short_name(class_name(int(concept), class_names), 12) for concept in order]
    names = labels if len(labels) <= MAX_TICKS else []
    panels = _Panels(results, left=0.2 + max(map(width_of, names), default=0.0), right=0.45, side=2.0)
    figure = panels.figure
    for panel, name, result in panels.drawn:
        noise = result.self_overlap
        floor = "" if math.isnan(noise) else f"upper limit (same class, other samples) {noise:.2f}"
        title = f"{name}\n{result.num_units:,} units; overlap {result.overlap:.2f}\n{floor}"
        write(figure, panel.left, panel.top + 0.05, title.rstrip(), va="bottom")
        similarity = result.similarity[order][:, order].numpy()
        corner, size = (panel.left, panel.bottom), (panel.width, panel.height)
        draw_cells(figure, similarity, corner, size, cmap=figures.DIVERGING, vmin=-1, vmax=1)
    for panel in panels.first_column:  # the order is the same in all panels
        for place, label in enumerate(names):
            write(
                figure,
                panel.left - 0.06,
                panel.top - (place + 0.5) * panel.height / len(names),
                label,
                size=7,
                ha="right",
            )
    left, bottom, tall = panels.width - 0.38, panels.first_column[-1].bottom, 2.0
    draw_cells(
        figure, np.linspace(1, -1, 65)[:, None], (left, bottom), (0.12, tall), cmap=figures.DIVERGING, vmin=-1, vmax=1
    )
    for value in (-1, 0, 1):
        write(figure, left + 0.16, bottom + (value + 1) / 2 * tall, str(value), size=7)
    cut = f"the first {MAX_CONCEPTS} " if len(order) == MAX_CONCEPTS else ""
    panels.write_foot(f"{cut}concepts, similar ones together; units in common: 0 as random paths, 1 the same path")
    return figure


def common_order(results: Mapping[str, PathResult]) -> Tensor:
    """The concepts that have a path in any layer, in an order in which similar ones are neighbours."""
    concepts = torch.stack([result.defined for result in results.values()]).any(0).nonzero().flatten()
    concepts = concepts[:MAX_CONCEPTS]
    mean = _mean([result.similarity[concepts][:, concepts] for result in results.values()])
    return concepts[_clustered(mean)] if len(concepts) else concepts


def _mean(similarities: Sequence[Tensor]) -> Tensor:
    """The mean over layers of what is defined, without a copy of all layers."""
    total, count = torch.zeros_like(similarities[0]), torch.zeros_like(similarities[0])
    for similarity in similarities:
        total += similarity.nan_to_num(nan=0.0)
        count += ~similarity.isnan()
    return total / count


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
    """Draw the path of one concept against that of another: a column of units per layer (the first 16).

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
    shown, left_out = list(results.items())[:MAX_COLUMNS], len(results) - MAX_COLUMNS
    names = [short_name(name, 20) for name, _ in shown]
    width = max(figures.CARD, 0.7 + len(shown) * max([0.8, *(0.1 + width_of(name, TICK) for name in names)]))
    figure = new_figure(width, 3.1)
    panel = Panel(0.5, 0.6, width - 0.6, 1.95, (-0.4, max(len(shown), 1) - 0.6), (1, 0))
    draw_lines(figure, [panel.outline])
    two = _most_similar(results) if pair is None else tuple(pair)
    if two is None or not shown or max(two) >= len(shown[0][1].masks):
        say(figure, panel, "two concepts with a path are needed")
        return figure
    colors = (figures.VALUE, figures.INK, figures.OTHER, figures.FAINT)
    edges = [_shares(result, two) for _, result in shown]
    bars = [
        panel.area([number - 0.18, number + 0.18], low, high)
        for number, column in enumerate(edges)
        for low, high in pairwise(column)
    ]
    bands = [
        panel.points(
            [x + 0.18, x + 0.82, x + 0.82, x + 0.18], [left[part], right[part], right[part + 1], left[part + 1]]
        )
        for x, (left, right) in enumerate(pairwise(edges))
        for part in range(3)
    ]
    draw_areas(figure, bars, colors * len(edges))
    draw_areas(figure, bands, colors[:3] * (len(edges) - 1), alpha=0.25)
    _draw_marks(figure, panel, [result for _, result in shown], edges, two)
    for number, (name, (_, result)) in enumerate(zip(names, shown, strict=True)):
        words = f"{name}\n{result.num_units:,} units"
        write(figure, panel.x(number), panel.bottom - 0.05, words, size=TICK, ha="center", va="top")
    y_ticks(figure, panel, {0: "0", 0.5: ".5", 1: "1"})
    write(figure, 0.12, panel.middle[1], "fraction of the layer's units", ha="center", upwards=True)
    if left_out > 0:
        write(figure, width - 0.05, 0.1, f"{left_out} more layers not drawn", ha="right")
    first, second = (short_name(class_name(concept, class_names), 14) for concept in two)
    legend = [
        ("■", figures.VALUE, f"only {first}"),
        ("■", figures.INK, "both (grey line: by chance)"),
        ("■", figures.OTHER, f"only {second}"),
    ]
    write_legend(figure, 0.1, 2.97, legend, width)
    return figure


def _shares(result: PathResult, pair: tuple[int, ...]) -> list[float]:
    """The edges of the four parts of a layer's units, from 0 to 1."""
    a, b = result.masks[pair[0]], result.masks[pair[1]]
    sizes = [float(part.double().mean()) for part in (a & ~b, a & b, ~a & b, ~a & ~b)]
    edges: list[float] = torch.tensor([0.0, *sizes]).cumsum(0).tolist()
    return edges


def _draw_marks(
    figure: "Figure", panel: Panel, shown: Sequence[PathResult], edges: Sequence[list[float]], pair: tuple[int, ...]
) -> None:
    """Draw the borders of units, where each of them can be seen, and how far the common part would reach by chance."""
    borders, by_chance = [], []
    for number, (result, column) in enumerate(zip(shown, edges, strict=True)):
        a, b = (result.masks[concept].double().mean() for concept in pair)
        sides = [number - 0.18, number + 0.18]
        by_chance.append(panel.points(sides, column[1] + float(a * b)))
        if result.num_units <= MAX_LINES:
            borders += [panel.points(sides, unit / result.num_units) for unit in range(1, result.num_units)]
    draw_lines(figure, borders, "white", 0.5)
    draw_lines(figure, by_chance, figures.NULL, 2)


def _most_similar(results: Mapping[str, PathResult]) -> tuple[int, int] | None:
    if not results:
        return None
    mean = _mean([result.similarity for result in results.values()])
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
    panels = _Panels(results, left=0.5, right=0.05, side=2.0, gap=0.45)
    figure, lines, bars = panels.figure, [], []
    for place, name, result in panels.drawn:
        paths = result.masks[result.defined]
        title = f"{name}\n{result.num_units:,} units, {len(paths)} paths"
        write(figure, place.left, place.top + 0.05, title, va="bottom")
        counts = torch.bincount(paths.sum(0), minlength=len(paths) + 1).double()
        expected = poisson_binomial(paths.double().mean(1)) * result.num_units
        highest = float(torch.cat([counts, expected]).max())
        panel = replace(place, x_range=(-0.5, len(counts) - 0.5), y_range=(0, 1.08 * max(highest, 1)))
        places = np.arange(len(counts) + 1) - 0.5
        bars.append(panel.area(places, 0, counts.numpy()))
        lines.append(panel.points(places[:-1] + 0.5, expected.numpy()))
        x_ticks(figure, panel, {0: "0", len(paths): str(len(paths))})
        y_ticks(figure, panel, {0: "0", round(highest): f"{round(highest):,}"})
    draw_areas(figure, bars, figures.VALUE)
    draw_lines(figure, lines, figures.NULL, 1.2)
    points = [line for line in lines if len(line) < 30]
    draw_points(figure, np.concatenate([np.zeros((0, 2)), *points]), ".", figures.NULL, 4)
    draw_lines(figure, [place.outline for place, _, _ in panels.drawn])
    for place in panels.first_column:
        write(figure, 0.12, place.middle[1], "units", ha="center", upwards=True)
    panels.write_foot("paths that contain a unit (■ units,  — if paths were random)")
    return figure


def poisson_binomial(probabilities: Tensor) -> Tensor:
    """The probabilities that 0, 1, ..., K of independent events happen, (K,) -> float64 (K + 1,)."""
    found = np.zeros(len(probabilities) + 1)
    found[0] = 1
    for events, probability in enumerate(probabilities.tolist(), start=1):
        rises = found[:events] * probability
        found[:events] -= rises
        found[1 : events + 1] += rises
    return torch.from_numpy(found)


class _Panels:
    """A figure with a panel per layer, which says where there is no path.

    Args:
        results: Layer -> result.
        left: Space to the left of the panels, in inches.
        right: Space to the right.
        side: Side of a panel.
        gap: Space between panels.
    """

    def __init__(
        self, results: Mapping[str, PathResult], *, left: float, right: float, side: float, gap: float = 0.2
    ) -> None:
        shown, rows, columns = first_panels(results)
        above, below = 0.6, 0.2
        self.left_out = layers_left_out(len(results))
        self.width = max(left + columns * side + (columns - 1) * gap + right + 0.1, figures.CARD)
        height = rows * (above + side + below) + 0.4
        self.figure = new_figure(self.width, height)
        self.drawn: list[tuple[Panel, str, PathResult]] = []
        self.first_column: list[Panel] = []
        for number, (name, result) in enumerate(shown):
            row, column = divmod(number, columns)
            bottom = height - row * (above + side + below) - above - side
            panel = Panel(left + column * (side + gap), bottom, side, side)
            self.first_column += [panel] if column == 0 else []
            if result.defined.any():
                self.drawn.append((panel, short_name(name, 24), result))
            else:
                draw_lines(self.figure, [panel.outline])
                write(self.figure, panel.left, panel.top + 0.05, short_name(name, 24), va="bottom")
                say(self.figure, panel, "no concept has a path")

    def write_foot(self, words: str) -> None:
        """Write what the panels show, and how many layers are left out."""
        words = "; ".join(filter(None, [words, self.left_out]))
        write(self.figure, 0.1, 0.06, wrapped(words, self.width - 0.2), va="bottom")
