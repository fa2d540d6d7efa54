"""Layout of a graph's nodes that changes little from one evaluation to the next.

networkx's `spring_layout` was tried instead. It moves every node by a full step whatever the force, and nothing holds
connected components together: started from its own result on the same graph, it moved nodes by up to .2 to 3.5 times
the median distance between nodes (this one by .05 to .2), and components drifted apart to five times the extent.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_neuro.topology.mapper_graph import MapperGraph

Positions = npt.NDArray[np.float64]


def place_nodes(graph: MapperGraph, previous: Tensor | None = None) -> Tensor:
    """Place nodes by springs along the edges and repulsion between all nodes.

    The first layout starts with the lens value from left to right and the first principal component of the activations
    from bottom to top. Later layouts start from the previous positions of the nodes' members, and move little.

    Args:
        graph: The graph.
        previous: float32 (num_points, 2), the previous position of each point, as `point_positions` returns it; NaN
            where unknown.

    Returns:
        float32 (nodes, 2), around the origin, mostly within -1 .. 1.
    """
    if graph.num_nodes == 0:
        return torch.zeros(0, 2)
    start = _first_positions(graph)
    steps, reach = 60, 0.1
    if previous is not None and len(previous) == graph.num_points:
        known = previous.numpy()
        for node, own in enumerate(graph.members):
            places = known[own.numpy()]
            places = places[~np.isnan(places[:, 0])]
            if len(places):
                start[node] = places.mean(axis=0)
        steps, reach = 25, 0.02
    return torch.from_numpy(_relaxed(start, graph.edges.numpy(), steps, reach)).float()


def point_positions(graph: MapperGraph, positions: Tensor) -> Tensor:
    """float32 (num_points, 2): the mean position of the nodes that hold each point; NaN for points in no node."""
    total, count = torch.zeros(graph.num_points, 2), torch.zeros(graph.num_points, 1)
    for own, position in zip(graph.members, positions, strict=True):
        total[own] += position
        count[own] += 1
    return total / count  # 0 / 0 is NaN


def _first_positions(graph: MapperGraph) -> Positions:
    centred = graph.mean_activation.double().numpy()
    centred = centred - centred.mean(axis=0)
    left, strength, _ = np.linalg.svd(centred, full_matrices=False)
    main = left[:, 0] * strength[0]
    main = main * np.sign(main[np.abs(main).argmax()] or 1)
    return np.stack([_spread(graph.lens_mean.numpy()), _spread(main)], axis=1)


def _spread(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Values shifted and scaled to -0.8 .. 0.8."""
    middle, half = (values.max() + values.min()) / 2, (values.max() - values.min()) / 2
    result: npt.NDArray[np.float64] = 0.8 * (values - middle) / (half or 1.0)
    return result


def _relaxed(positions: Positions, edges: npt.NDArray[np.int64], steps: int, reach: float) -> Positions:
    """Fruchterman and Reingold's forces, with a weak pull to the centre that keeps all components in the figure."""
    n = len(positions)
    # Nodes with the same members start at the same position, where no force could separate them.
    angle = 2.4 * np.arange(n)
    positions = positions + 1e-3 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    linked = np.zeros((n, n))
    linked[edges[:, 0], edges[:, 1]] = linked[edges[:, 1], edges[:, 0]] = 1
    ideal = 1.2 / np.sqrt(n)
    for limit in np.linspace(reach, 0, steps, endpoint=False):
        apart = positions[:, None] - positions[None]
        distance = np.maximum(np.linalg.norm(apart, axis=2), 1e-3)
        push = (ideal / distance) ** 2 - linked * distance / ideal
        force = (apart * push[..., None]).sum(axis=1) - 0.5 * positions
        length = np.maximum(np.linalg.norm(force, axis=1, keepdims=True), 1e-9)
        positions = positions + force / length * np.minimum(length, limit)
    return positions
