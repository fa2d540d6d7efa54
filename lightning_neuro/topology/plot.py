"""The Mapper graph of each layer in one figure: nodes are pies of classes, joined where they share samples."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_neuro import figures
from lightning_neuro.figure_panels import Array, Panel, draw_areas, draw_lines, say
from lightning_neuro.figure_words import LEGEND_LINE, Entry, legend_places, wrapped, write, write_legend
from lightning_neuro.topology.layout import place_nodes
from lightning_neuro.topology.mapper_graph import MapperGraph
from lightning_neuro.topology.result import TopologyResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LETTERS = "ABCDEF"
MAX_CLASSES = 10
_PANEL, _TOP, _GAP = 3.0, 0.95, 0.2  # inches

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
    width = max(columns * (_PANEL + _GAP) + _GAP, figures.CARD)
    foot = "Area: samples in the cluster; line: shared samples (Jaccard index); A to F: largest clusters."
    foot = wrapped(f"{foot} {figures.layers_left_out(len(graphs))}", width - 2 * _GAP)
    colors = _colors([graph for _, (_, graph) in shown])
    entries = _classes(colors, class_names)
    lines = 1 + max((line for _, line in legend_places(entries, _GAP, width)), default=-1)
    bottom = 0.35 + 0.14 * foot.count("\n") + LEGEND_LINE * lines
    height = rows * (_PANEL + _TOP) + bottom
    figure = figures.new_figure(width, height)
    panels = []
    for number, (name, (result, graph)) in enumerate(shown):
        row, column = divmod(number, columns)
        left, low = _GAP + column * (_PANEL + _GAP), height - (row + 1) * (_PANEL + _TOP)
        panels.append(Panel(left, low, _PANEL, _PANEL))
        title = "\n".join(_title(name, result, graph))
        write(figure, left, low + _PANEL + 0.05, title, va="bottom")
        place = (positions or {}).get(name)
        _draw_panel(figure, panels[-1], graph, colors, place_nodes(graph) if place is None else place)
    draw_lines(figure, [panel.outline for panel in panels], figures.FAINT)
    write_legend(figure, _GAP, bottom - 0.14, entries, width)
    write(figure, _GAP, 0.08, foot, va="bottom")
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


def _draw_panel(figure: "Figure", panel: Panel, graph: MapperGraph, colors: Colors, positions: Tensor) -> None:
    if graph.num_nodes == 0:
        say(figure, panel, wrapped(graph.why_empty(), 0.9 * _PANEL))
        return
    largest = min(0.2, 0.6 * _PANEL / math.sqrt(graph.num_nodes) / 2)
    radii = largest * np.sqrt(graph.sizes.numpy() / int(graph.sizes.max())).clip(0.2)
    centres = _inside(positions, panel, largest)
    lines = list(centres[graph.edges.numpy()])
    draw_lines(figure, lines, figures.NULL, 0.6 + 4 * graph.weights.numpy(), zorder=1)
    wedges, colours = _pies(graph, centres, radii, colors)
    draw_areas(figure, wedges, colours, edgecolors="white", linewidths=0.3, zorder=2)
    for letter, node in zip(LETTERS, lettered(graph), strict=False):
        x, y = centres[node] + 0.75 * radii[node] + 0.06
        write(figure, x, y, letter, ha="center", bold=True)


def _inside(positions: Tensor, panel: Panel, margin: float) -> Array:
    """Positions shifted and scaled, equally in both directions, to fill the panel."""
    places = positions.double().numpy()
    low, high = places.min(axis=0), places.max(axis=0)
    scale = (_PANEL - 2.6 * margin) / max(float((high - low).max()), 1e-9)
    moved: Array = (places - (low + high) / 2) * scale + np.array(panel.middle)
    return moved


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
        lines.append(f"{graph.coverage:.0%} in {nodes}, {components}")
        if graph.purity is not None:
            lines.append(f"purity {graph.purity.node_wise:.2f}, permuted labels {graph.purity.node_wise_null:.2f}")
        if "num_loops_null" in (null := result.null):
            lines.append(f"loops {graph.num_loops()} (Gaussian {null['num_loops_null']:.1f})")
            lines.append(f"branches {len(graph.branches())} (Gaussian {null['num_branches_null']:.1f})")
    return lines


def _classes(colors: Colors, class_names: Sequence[str] | None) -> list[Entry]:
    """The legend of the classes: sign, colour and name."""
    entries: list[Entry] = [
        ("■", color, figures.short_name(figures.class_name(label, class_names), 16)) for label, color in colors.items()
    ]
    return entries + ([("■", figures.FAINT, "other")] if len(colors) == MAX_CLASSES - 1 else [])
