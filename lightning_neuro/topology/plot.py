"""The Mapper graph of each layer in one figure: nodes are pies of classes, joined where they share samples."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_neuro import figures
from lightning_neuro.topology.layout import place_nodes
from lightning_neuro.topology.mapper_graph import MapperGraph
from lightning_neuro.topology.result import TopologyResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LETTERS = "ABCDEF"
MAX_CLASSES = 10
_PANEL, _TOP, _GAP, _BOTTOM = 3.6, 0.85, 0.3, 0.75  # inches

Colors = dict[int, str]


def plot_graphs(
    results: Mapping[str, TopologyResult],
    positions: Mapping[str, Tensor] | None = None,
    *,
    class_names: Sequence[str] | None = None,
) -> "Figure":
    """Draw each layer's Mapper graph, one panel per layer (the first 8).

    A node is a cluster of samples: its area is proportional to their number, its pie shows their classes. A line joins
    clusters that share samples; its width is their Jaccard index. Neighbouring pies of a single colour mean that the
    layer separates these classes; the title gives the purity, and the purity with permuted labels. Nodes at opposite
    ends of a chain differ in the lens value (in the first figure small norms are on the left). Letters mark the largest
    nodes. Loops and branches are meaningful only if there are more of them than in Gaussian clouds without structure.

    Args:
        results: Layer name -> result with a graph; an empty name is not shown.
        positions: Layer name -> (nodes, 2), the positions of the nodes; default: `place_nodes`.
        class_names: Names of the classes.

    Returns:
        A matplotlib figure that is not registered with pyplot, so it need not be closed.

    Raises:
        ValueError: If no result holds a graph.

    Example:
        >>> import torch
        >>> from lightning_neuro.topology import ActivationShape
        >>> metric = ActivationShape()
        >>> metric.update(torch.randn(100, 6, generator=torch.Generator().manual_seed(0)))
        >>> figure = plot_graphs({"fc1": metric.compute()})
    """
    graphs = {name: (result, result.graph) for name, result in results.items() if result.graph is not None}
    shown, rows, columns = figures.first_panels(graphs)
    figure = figures.new_figure(columns * (_PANEL + _GAP) + _GAP, rows * (_PANEL + _TOP) + _BOTTOM)
    axes = figures.inch_axes(figure)
    width, height = figure.get_size_inches()
    colors = _colors([graph for _, (_, graph) in shown])
    for panel, (name, (result, graph)) in enumerate(shown):
        row, column = divmod(panel, columns)
        corner = (_GAP + column * (_PANEL + _GAP), height - (row + 1) * (_PANEL + _TOP))
        left, bottom = corner
        title = "\n".join(_title(name, result, graph))
        axes.text(left, bottom + _PANEL + 0.06, title, fontsize=8, va="bottom", linespacing=1.3)
        place = (positions or {}).get(name)
        _draw_panel(axes, corner, graph, colors, place_nodes(graph) if place is None else place)
    _legend(axes, width, colors, class_names, figures.layers_left_out(len(graphs)))
    return figure


def lettered(graph: MapperGraph) -> list[int]:
    """The largest nodes, at most six, the largest first: A, B, ... in the figures."""
    return torch.argsort(graph.sizes, descending=True, stable=True)[: len(LETTERS)].tolist()


def _colors(graphs: Sequence[MapperGraph]) -> Colors:
    """The colours of up to ten classes; if there are more, the first nine have a colour, and the others share grey."""
    present: set[int] = set()
    for graph in graphs:
        if graph.class_counts is not None:
            present |= set(graph.classes[graph.class_counts.sum(dim=0) > 0].tolist())
    shown = sorted(present)
    shown = shown if len(shown) <= MAX_CLASSES else shown[: MAX_CLASSES - 1]
    colors = {label: figures.class_color(label) for label in shown}
    # Labels such as 0 and 10 would have the same colour; in that case colours are assigned by position.
    return (
        colors if len(set(colors.values())) == len(shown) else {c: figures.class_color(i) for i, c in enumerate(shown)}
    )


def _draw_panel(
    axes: "Axes", corner: tuple[float, float], graph: MapperGraph, colors: Colors, positions: Tensor
) -> None:
    from matplotlib.collections import LineCollection, PolyCollection

    left, bottom = corner
    box = np.array([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)]) * _PANEL + corner
    axes.add_collection(LineCollection([box], colors=figures.FAINT, linewidths=0.8), autolim=False)
    if graph.num_nodes == 0:
        why = textwrap.fill(graph.why_empty(), 40)
        axes.text(left + _PANEL / 2, bottom + _PANEL / 2, why, fontsize=9, ha="center", va="center")
        return
    largest = min(0.28, 0.6 * _PANEL / math.sqrt(graph.num_nodes) / 2)
    radii = largest * np.sqrt(graph.sizes.numpy() / int(graph.sizes.max())).clip(0.2)
    centres = _inside(positions, corner, largest)
    lines = centres[graph.edges.numpy()]
    widths = 0.6 + 5 * graph.weights.numpy()
    axes.add_collection(LineCollection(list(lines), colors=figures.NULL, linewidths=widths, zorder=1), autolim=False)
    wedges, colours = _pies(graph, centres, radii, colors)
    pies = PolyCollection(wedges, facecolors=colours, edgecolors="white", linewidths=0.3, zorder=2)
    axes.add_collection(pies, autolim=False)
    for letter, node in zip(LETTERS, lettered(graph), strict=False):
        x, y = centres[node]
        axes.text(x + radii[node], y + radii[node], letter, fontsize=7, ha="center", va="center", weight="bold")


def _inside(positions: Tensor, corner: tuple[float, float], margin: float) -> Any:
    """Positions shifted and scaled, equally in both directions, to fill the panel."""
    places = positions.double().numpy()
    low, high = places.min(axis=0), places.max(axis=0)
    scale = (_PANEL - 2.6 * margin) / max(float((high - low).max()), 1e-9)
    return (places - (low + high) / 2) * scale + np.array(corner) + _PANEL / 2


def _pies(graph: MapperGraph, centres: Any, radii: Any, colors: Colors) -> tuple[list[Any], list[str]]:
    """Polygons of the wedges, and their colours; without labels one grey disc per node."""
    wedges, colours = [], []
    shares = graph.class_shares
    for node in range(graph.num_nodes):
        parts = [(1.0, figures.NULL)]
        if shares is not None and colors:
            own = dict(zip(graph.classes.tolist(), shares[node].tolist(), strict=True))
            parts = [(own.get(label, 0.0), color) for label, color in colors.items()]
            parts.append((1 - sum(share for share, _ in parts), figures.FAINT))
        begin = 0.25
        for share, colour in parts:
            if share <= 1e-9:
                continue
            angles = 2 * np.pi * np.linspace(begin, begin - share, 2 + math.ceil(40 * share))
            rim = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[node] + centres[node]
            wedges.append(rim if share > 1 - 1e-9 else np.concatenate([rim, centres[node : node + 1]]))
            colours.append(colour)
            begin -= share
    return wedges, colours


def _title(name: str, result: TopologyResult, graph: MapperGraph) -> list[str]:
    points = f"{graph.num_points - graph.num_nonfinite:,} samples"
    lines = [f"{figures.short_name(name)}: {points}" if name else points]
    if graph.num_nodes:
        nodes = f"{graph.num_nodes} node" + "s" * (graph.num_nodes != 1)
        components = f"{graph.num_components} component" + "s" * (graph.num_components != 1)
        lines[0] += f", {graph.coverage:.0%} in {nodes}, {components}"
        if graph.purity is not None:
            lines.append(f"purity {graph.purity.node_wise:.2f}, with permuted labels {graph.purity.node_wise_null:.2f}")
        if null := result.null:
            loops = f"loops {graph.num_loops()} (Gaussian {null['num_loops_null']:.1f})"
            lines.append(f"{loops}, branches {len(graph.branches())} (Gaussian {null['num_branches_null']:.1f})")
    return lines


def _legend(axes: "Axes", width: float, colors: Colors, class_names: Sequence[str] | None, left_out: str) -> None:
    """A legend of coloured words, in a tenth of the time of a matplotlib legend."""
    entries = [
        (figures.short_name(figures.class_name(label, class_names), 16), color) for label, color in colors.items()
    ]
    entries += [("other", figures.FAINT)] if len(colors) == MAX_CLASSES - 1 else []
    x, y = _GAP, 0.52
    for text, colour in entries:
        if x > _GAP and x + 0.16 + 0.075 * len(text) > width:
            x, y = _GAP, y - 0.18
        axes.text(x, y, "■", fontsize=12, color=colour, va="center")
        axes.text(x + 0.16, y, text, fontsize=8, va="center")
        x += 0.07 * len(text) + 0.3
    foot = "Area: samples in the cluster; line: shared samples (Jaccard index); A to F: largest clusters."
    foot = f"{foot} {left_out}".strip()
    axes.text(_GAP, 0.06, textwrap.fill(foot, int(15 * width)), fontsize=7, color=figures.INK, va="bottom")
