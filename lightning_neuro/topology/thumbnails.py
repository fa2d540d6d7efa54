"""Small images of the samples, and a figure of those in the largest nodes of each graph."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_neuro.topology.graph import MapperGraph
from lightning_neuro.topology.plot import MAX_PANELS, lettered
from lightning_neuro.topology.result import TopologyResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 32
MEMBERS = 8


def thumbnails(inputs: Any) -> Tensor | None:
    """The model's inputs as uint8 (N, height, width, 3) images of at most 32 pixels a side; None if they are none.

    Images are real tensors of shape (N, 1 or 3, height, width). Each is stretched to the full range of grey, because
    inputs are often normalised and their true range is not known.
    """
    if not isinstance(inputs, Tensor) or inputs.ndim != 4 or inputs.shape[1] not in (1, 3) or inputs.is_complex():
        return None
    images = inputs.detach().float()
    longest = max(images.shape[2:])
    if longest > SIDE:
        size = [max(1, round(side * SIDE / longest)) for side in images.shape[2:]]
        images = interpolate(images, size=size, mode="area")
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    bright = ((images - low) / (high - low).clamp(min=1e-12) * 255).nan_to_num()
    return bright.clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().contiguous()


def plot_members(results: Mapping[str, TopologyResult], images: Mapping[str, Mapping[int, Tensor]]) -> "Figure":
    """Show samples in the largest nodes of each layer's Mapper graph, a panel per layer (the first 8).

    A row is a node, by its letter in the figure of the graphs, with its size and its largest class; the images are the
    first of its members in the sample set. They show what the samples of a node have in common.

    Args:
        results: Layer name -> result with a graph.
        images: Layer name -> position in the graph's points -> (height, width, 3) uint8 image; points without one are
            passed over.

    Raises:
        ValueError: If no result holds a graph.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [(name, result.graph) for name, result in results.items() if result.graph is not None][:MAX_PANELS]
    if not shown:
        raise ValueError("results must hold at least one layer's Mapper graph, but there is none.")
    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)
    panel, label, title = (2.8, 2.1), 1.0, 0.35
    width, height = columns * (panel[0] + label + 0.1) + 0.1, rows * (panel[1] + title) + 0.1
    figure = Figure(figsize=(width, height), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height), autoscale_on=False)
    axes.set_axis_off()
    for number, (name, graph) in enumerate(shown):
        row, column = divmod(number, columns)
        left, bottom = 0.1 + column * (panel[0] + label + 0.1) + label, height - (row + 1) * (panel[1] + title)
        axes.text(left - label, bottom + panel[1] + 0.08, name, fontsize=9, weight="bold")
        nodes = lettered(graph)
        if not nodes:
            axes.text(left, bottom + panel[1] / 2, "no node", fontsize=8)
            continue
        tall = panel[1] / 6
        extent = (left, left + panel[0], bottom + panel[1] - tall * len(nodes), bottom + panel[1])
        axes.imshow(_montage(graph, nodes, images.get(name, {})), extent=extent, aspect="auto", interpolation="nearest")
        for place, (letter, node) in enumerate(zip("ABCDEF", nodes, strict=False)):
            height_of_row = bottom + panel[1] - tall * (place + 0.5)
            axes.text(left - label, height_of_row, f"{letter}  {_words(graph, node)}", fontsize=7, va="center")
    return figure


def _montage(graph: MapperGraph, nodes: list[int], images: Mapping[int, Tensor]) -> Any:
    sheet = np.full((len(nodes) * (SIDE + 2), MEMBERS * (SIDE + 2), 3), 255, dtype=np.uint8)
    for row, node in enumerate(nodes):
        members = [own for own in graph.members[node].tolist() if own in images][:MEMBERS]
        for column, own in enumerate(members):
            image = images[own].numpy()
            enlarge = max(1, SIDE // max(image.shape[:2]))
            image = image.repeat(enlarge, axis=0).repeat(enlarge, axis=1)
            y, x = row * (SIDE + 2) + 1, column * (SIDE + 2) + 1
            sheet[y : y + image.shape[0], x : x + image.shape[1]] = image
    return sheet


def _words(graph: MapperGraph, node: int) -> str:
    size = f"{int(graph.sizes[node])}"
    if graph.class_shares is None:
        return f"{size} samples"
    share, column = graph.class_shares[node].max(dim=0)
    return f"{size}, {float(share):.0%} class {int(graph.classes[column])}"
