"""The Mapper graph of each layer in one figure: pies of classes, joined where they share samples."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_neuro.topology.graph import MapperGraph
from lightning_neuro.topology.layout import layout
from lightning_neuro.topology.result import TopologyResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PANELS = 8
LETTERED = 6
COLOURS = (  # Paul Tol's "muted", safe for colour-blind readers; the last one for all further classes
    *("#332288", "#88ccee", "#44aa99", "#117733", "#999933"),
    *("#ddcc77", "#cc6677", "#882255", "#aa4499", "#bbbbbb"),
)
_PANEL, _TOP, _GAP, _BOTTOM = 3.6, 0.85, 0.3, 0.75  # inches


def plot_graphs(results: Mapping[str, TopologyResult], positions: Mapping[str, Tensor] | None = None) -> "Figure":
    """Draw each layer's Mapper graph, a panel per layer (the first 8).

    A node is a cluster of samples: its area says how many, its pie which classes; a line joins clusters that share
    samples, the thicker the larger the share (Jaccard). Pies of one colour beside each other mean that the layer tells
    these classes apart; the line above says how pure they are, and how pure with permuted labels. Nodes at opposite
    ends of a chain differ in the lens value (first picture: small norms left). The letters name the largest nodes. A
    loop or branch means something only where there are more of them than in Gaussian clouds without structure.

    Args:
        results: Layer name -> result with a graph; an empty name is not written.
        positions: Layer name -> (nodes, 2) where to draw the nodes; default: `layout`.

    Returns:
        A matplotlib figure not known to pyplot, so there is nothing to close.

    Raises:
        ValueError: If no result holds a graph.

    Example:
        >>> import torch
        >>> from lightning_neuro.topology import ActivationShape
        >>> metric = ActivationShape()
        >>> metric.update(torch.randn(100, 6, generator=torch.Generator().manual_seed(0)))
        >>> figure = plot_graphs({"fc1": metric.compute()})
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    graphs = {name: result for name, result in results.items() if result.graph is not None}
    if not graphs:
        raise ValueError("results must hold at least one layer's Mapper graph, but there is none.")
    shown = list(graphs.items())[:MAX_PANELS]
    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)
    width, height = columns * (_PANEL + _GAP) + _GAP, rows * (_PANEL + _TOP) + _BOTTOM
    figure = Figure(figsize=(width, height), dpi=100)
    FigureCanvasAgg(figure)
    # One axes in inches holds all panels: an axes of its own for each would double the time it takes to draw.
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height), autoscale_on=False)
    axes.set_axis_off()
    classes = _shown_classes([result.graph for _, result in shown if result.graph is not None])
    for panel, (name, result) in enumerate(shown):
        row, column = divmod(panel, columns)
        corner = (_GAP + column * (_PANEL + _GAP), height - (row + 1) * (_PANEL + _TOP))
        place = (positions or {}).get(name)
        _draw_panel(axes, corner, name, result, classes, place)
    _legend(axes, width, classes, len(graphs) - len(shown))
    return figure


def lettered(graph: MapperGraph) -> list[int]:
    """The largest nodes, at most six, the largest first: A, B, ... in the figures."""
    return torch.argsort(graph.sizes, descending=True, stable=True)[:LETTERED].tolist()


def _shown_classes(graphs: Sequence[MapperGraph]) -> list[int]:
    """Up to ten classes have a colour of their own; of more, the first nine, and grey for the rest."""
    present: set[int] = set()
    for graph in graphs:
        if graph.class_counts is not None:
            present |= set(graph.classes[graph.class_counts.sum(dim=0) > 0].tolist())
    shown = sorted(present)
    return shown if len(shown) <= len(COLOURS) else shown[: len(COLOURS) - 1]


def _draw_panel(
    axes: "Axes",
    corner: tuple[float, float],
    name: str,
    result: TopologyResult,
    classes: Sequence[int],
    place: Tensor | None,
) -> None:
    from matplotlib.collections import LineCollection, PolyCollection

    graph = result.graph
    assert graph is not None
    left, bottom = corner
    box = np.array([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)]) * _PANEL + corner
    axes.add_collection(LineCollection([box], colors="0.85", linewidths=0.8), autolim=False)
    axes.text(left, bottom + _PANEL + 0.06, "\n".join(_title(name, result)), fontsize=8, va="bottom", linespacing=1.3)
    if graph.num_nodes == 0:
        why = textwrap.fill(graph.notes()["undefined"], 40)
        axes.text(left + _PANEL / 2, bottom + _PANEL / 2, why, fontsize=9, ha="center", va="center")
        return
    largest = min(0.28, 0.6 * _PANEL / math.sqrt(graph.num_nodes) / 2)
    radii = largest * np.sqrt(graph.sizes.numpy() / int(graph.sizes.max())).clip(0.2)
    centres = _inside(layout(graph) if place is None else place, corner, largest)
    lines = centres[graph.edges.numpy()]
    widths = 0.6 + 5 * graph.weights.numpy()
    axes.add_collection(LineCollection(list(lines), colors="0.6", linewidths=widths, zorder=1), autolim=False)
    wedges, colours = _pies(graph, centres, radii, classes)
    pies = PolyCollection(wedges, facecolors=colours, edgecolors="white", linewidths=0.3, zorder=2)
    axes.add_collection(pies, autolim=False)
    for letter, node in zip("ABCDEF", lettered(graph), strict=False):
        x, y = centres[node]
        axes.text(x + radii[node], y + radii[node], letter, fontsize=7, ha="center", va="center", weight="bold")


def _inside(positions: Tensor, corner: tuple[float, float], margin: float) -> Any:
    """Positions moved and scaled, alike in both directions, to fill the panel."""
    places = positions.double().numpy()
    low, high = places.min(axis=0), places.max(axis=0)
    scale = (_PANEL - 2.6 * margin) / max(float((high - low).max()), 1e-9)
    return (places - (low + high) / 2) * scale + np.array(corner) + _PANEL / 2


def _pies(graph: MapperGraph, centres: Any, radii: Any, classes: Sequence[int]) -> tuple[list[Any], list[str]]:
    """Polygons of the wedges, and their colours; without labels one grey disc a node."""
    wedges, colours = [], []
    shares = graph.class_shares
    for node in range(graph.num_nodes):
        parts = [(1.0, "#777777")]
        if shares is not None and classes:
            own = dict(zip(graph.classes.tolist(), shares[node].tolist(), strict=True))
            parts = [(own.get(c, 0.0), COLOURS[i]) for i, c in enumerate(classes)]
            parts.append((1 - sum(share for share, _ in parts), COLOURS[-1]))
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


def _title(name: str, result: TopologyResult) -> list[str]:
    graph = result.graph
    assert graph is not None
    points = f"{graph.num_points - graph.num_nonfinite:,} samples"
    lines = [f"{name}: {points}" if name else points]
    if graph.num_nodes:
        nodes = f"{graph.num_nodes} node" + "s" * (graph.num_nodes != 1)
        pieces = f"{graph.num_components} piece" + "s" * (graph.num_components != 1)
        lines[0] += f", {graph.coverage:.0%} in {nodes}, {pieces}"
        if graph.purity is not None:
            lines.append(f"purity {graph.purity.node_wise:.2f}, with permuted labels {graph.purity.node_wise_null:.2f}")
        null = result.null
        loops = f"loops {graph.large_loops()} (Gaussian {null['loops_null']:.1f})" if null else ""
        lines.append(
            f"{loops}, branches {len(graph.branches())} (Gaussian {null['branches_null']:.1f})" if null else ""
        )
    return lines


def _legend(axes: "Axes", width: float, classes: Sequence[int], left_out: int) -> None:
    """Coloured words: a tenth of the time of a matplotlib legend."""
    entries = [(f"class {c}" if i == 0 else f"{c}", COLOURS[i]) for i, c in enumerate(classes)]
    entries += [("other", COLOURS[-1])] if len(classes) == len(COLOURS) - 1 else []
    x = _GAP
    for text, colour in entries:
        axes.text(x, 0.42, "■", fontsize=12, color=colour, va="center")
        axes.text(x + 0.16, 0.42, text, fontsize=9, va="center")
        x += 0.08 * len(text) + 0.32
    more = f" {left_out} more layers are not drawn." if left_out else ""
    foot = "Area: samples in the cluster; line: shared samples (Jaccard index); A to F: the largest." + more
    axes.text(_GAP, 0.08, textwrap.fill(foot, int(15 * width)), fontsize=7, color="0.3", va="bottom")
