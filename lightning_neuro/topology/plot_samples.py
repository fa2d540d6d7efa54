"""A figure of samples in the largest nodes of each Mapper graph."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lightning_neuro import figures
from lightning_neuro.figure_panels import draw_cells
from lightning_neuro.figure_words import write
from lightning_neuro.topology.mapper_graph import MapperGraph
from lightning_neuro.topology.plot import LETTERS, lettered
from lightning_neuro.topology.result import TopologyResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEMBERS = 6
_CELL = figures.THUMBNAIL_SIDE + 2
_PANEL = MEMBERS * _CELL / figures.DPI, len(LETTERS) * _CELL / figures.DPI  # inches: one pixel of an image is one here
_LABEL, _TITLE = 1.25, 0.3


def plot_members(
    results: Mapping[str, TopologyResult],
    images: Mapping[str, Mapping[int, Tensor]],
    *,
    class_names: Sequence[str] | None = None,
) -> "Figure":
    """Show samples in the largest nodes of each layer's Mapper graph, one panel per layer (the first 8).

    A row is a node, with its letter in the figure of the graphs, its size and its largest class; the images are the
    first of its members in the probe set. They show what the samples of a node have in common.

    Args:
        results: Layer name -> result with a graph.
        images: Layer name -> index of the graph's point -> (height, width, 3) uint8 image; points without an image are
            skipped.
        class_names: Names of the classes.

    Returns:
        A matplotlib figure that is not registered with pyplot, so it need not be closed.

    Raises:
        ValueError: If no result holds a graph.
    """
    graphs = {name: result.graph for name, result in results.items() if result.graph is not None}
    shown, rows, columns = figures.first_panels(graphs)
    (wide, tall), step = _PANEL, _PANEL[1] / len(LETTERS)
    more = figures.layers_left_out(len(graphs))
    foot = 0.2 * bool(more)
    figure = figures.new_figure(columns * (wide + _LABEL + 0.1) + 0.1, rows * (tall + _TITLE) + 0.1 + foot)
    height = figure.get_size_inches()[1]
    write(figure, 0.1, 0.12, more)
    for number, (name, graph) in enumerate(shown):
        row, column = divmod(number, columns)
        left, bottom = 0.1 + column * (wide + _LABEL + 0.1) + _LABEL, height - (row + 1) * (tall + _TITLE)
        write(figure, left - _LABEL, bottom + tall + 0.15, figures.short_name(name), size=9, bold=True)
        nodes = lettered(graph)
        if not nodes:
            write(figure, left, bottom + tall / 2, "no node")
            continue
        montage, used = _montage(graph, nodes, images.get(name, {})), step * len(nodes)
        draw_cells(figure, montage, (left, bottom + tall - used), (wide, used), framed=False)
        for place, (letter, node) in enumerate(zip(LETTERS, nodes, strict=False)):
            words = f"{letter}  {_describe_node(graph, node, class_names)}"
            write(figure, left - _LABEL, bottom + tall - step * (place + 0.5), words)
    return figure


def _montage(graph: MapperGraph, nodes: list[int], images: Mapping[int, Tensor]) -> npt.NDArray[np.uint8]:
    """The images of the first members, one row per node."""
    sheet = np.full((len(nodes) * _CELL, MEMBERS * _CELL, 3), 255, dtype=np.uint8)
    for row, node in enumerate(nodes):
        members = [own for own in graph.members[node].tolist() if own in images][:MEMBERS]
        for column, own in enumerate(members):
            image = images[own].numpy()
            enlarge = max(1, figures.THUMBNAIL_SIDE // max(image.shape[:2]))
            image = image.repeat(enlarge, axis=0).repeat(enlarge, axis=1)
            y, x = row * _CELL + 1, column * _CELL + 1
            sheet[y : y + image.shape[0], x : x + image.shape[1]] = image
    return sheet


def _describe_node(graph: MapperGraph, node: int, class_names: Sequence[str] | None) -> str:
    size = f"{int(graph.sizes[node])}"
    if graph.class_shares is None:
        return f"{size} samples"
    share, column = graph.class_shares[node].max(dim=0)
    name = figures.class_name(int(graph.classes[column]), class_names)
    return f"{size}, {float(share):.0%} {figures.short_name(name, 12)}"
