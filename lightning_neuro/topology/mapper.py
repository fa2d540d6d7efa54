"""Mapper: the shape of a cloud of points as a graph of overlapping clusters."""

from collections.abc import Sequence
from typing import Unpack

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_neuro.checks import ArrayLike, as_activations, as_labels, finite_rows
from lightning_neuro.topology.clustering import dbscan
from lightning_neuro.topology.cover import cover_intervals, default_num_intervals, lens_values
from lightning_neuro.topology.mapper_graph import MapperGraph
from lightning_neuro.topology.options import MapperOptions, MapperSettings
from lightning_neuro.topology.radius import adaptive_eps

Group = npt.NDArray[np.int64]


def compute_mapper(
    points: ArrayLike, *, targets: ArrayLike | None = None, **options: Unpack[MapperOptions]
) -> MapperGraph:
    """Summarise a cloud of points as a Mapper graph: its connected components, branches and loops.

    A lens maps each point to a number. Overlapping intervals cover these numbers. Inside each interval the points are
    clustered by DBSCAN; a cluster is a node, and nodes that share points are joined by an edge. Read it as a map: which
    samples lie together, and how groups are connected as the lens value grows. Do not interpret small features: a loop
    or a branch of few points depends on the options and on chance.

    With the same options, nodes and edges are those of KeplerMapper with scikit-learn's DBSCAN, except that a lens that
    is constant over the points has a single interval here.

    Args:
        points: (N, units) NumPy array or tensor; on a CUDA tensor the distances are computed on the GPU. Rows with NaN
            or infinite values are counted and left out.
        targets: (N,) integer class labels, negative if unlabelled.
        options: The options from `lens` on in `TopologyOptions`.

    Returns:
        The graph. It has no nodes if no interval has `min_samples` points close together. Points that all coincide
        form one node.

    Raises:
        ArgumentError: If an argument is invalid; the message names it.

    Source:
        G. Singh, F. Mémoli, G. Carlsson (2007); for activations: A. Rathore, N. Chalapathi, S. Palande, B. Wang,
        "TopoAct: Visually Exploring the Shape of Activations in Deep Learning", arXiv 1912.06332 (2021).

    Example:
        >>> import torch
        >>> angle = torch.linspace(0, 6.2832, 201)[:-1]
        >>> circle = torch.stack([angle.cos(), angle.sin()], dim=1)
        >>> graph = compute_mapper(circle, lens=lambda points: points[:, 0], num_intervals=6, eps=0.1)
        >>> graph.num_nodes, graph.num_edges, graph.num_loops()
        (10, 10, 1)
    """
    return mapper_of(points, targets, MapperSettings(**options))


def mapper_of(points: ArrayLike, targets: ArrayLike | None, settings: MapperSettings) -> MapperGraph:
    """Compute the Mapper graph with checked settings; see `compute_mapper`."""
    points = as_activations(points, name="points")
    labels = as_labels(targets, len(points))
    finite = torch.nonzero(finite_rows(points)).flatten()
    kept = points[finite] if len(finite) < len(points) else points

    values = lens_values(kept, settings.lens)
    wanted = default_num_intervals(len(kept)) if settings.num_intervals is None else settings.num_intervals
    lower, upper = cover_intervals(
        values, num_intervals=wanted, overlap_fraction=settings.overlap_fraction, cover=settings.cover
    )
    groups = [np.nonzero((values >= a) & (values <= b))[0] for a, b in zip(lower, upper, strict=True)]
    eps = settings.eps
    if eps is None:
        eps = adaptive_eps(kept, groups, min_samples=settings.min_samples, distance=settings.distance)
    members, interval = _nodes(kept, groups, eps, settings)
    edges, weights = _edges(members, len(kept))
    original = finite.cpu()
    return MapperGraph(
        members=tuple(original[torch.from_numpy(own)] for own in members),
        interval=torch.tensor(interval, dtype=torch.int64),
        edges=edges,
        weights=weights,
        lens_mean=torch.tensor([values[own].mean() for own in members], dtype=torch.float64),
        mean_activation=_means(kept, members),
        num_points=len(points),
        num_nonfinite=len(points) - len(kept),
        num_intervals=len(groups),
        eps=float(eps),
        min_samples=settings.min_samples,
        targets=None if labels is None else labels.cpu(),
    )


def _nodes(
    points: Tensor, groups: Sequence[Group], eps: float, settings: MapperSettings
) -> tuple[list[Group], list[int]]:
    members, interval = [], []
    for number, group in enumerate(groups):
        inside = points[torch.from_numpy(group).to(points.device)]
        labels = dbscan(inside, eps=eps, min_samples=settings.min_samples, distance=settings.distance)
        for label in range(labels.max(initial=-1) + 1):
            members.append(group[labels == label])
            interval.append(number)
    return members, interval


def _edges(members: Sequence[Group], num_points: int) -> tuple[Tensor, Tensor]:
    """Pairs of nodes that share points, and their Jaccard indices, by one product of the incidence matrix."""
    from scipy.sparse import csr_matrix, triu

    if not members:
        return torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
    sizes = np.array([len(own) for own in members])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    ones = np.ones(starts[-1], dtype=np.int64)
    incidence = csr_matrix((ones, np.concatenate(members), starts), shape=(len(members), num_points))
    shared = triu(incidence @ incidence.T, k=1).tocsr().tocoo()
    edges = np.stack([shared.row, shared.col], axis=1).astype(np.int64)
    jaccard = shared.data / (sizes[shared.row] + sizes[shared.col] - shared.data)
    order = np.lexsort((edges[:, 1], edges[:, 0]))
    return torch.from_numpy(edges[order]), torch.from_numpy(jaccard[order])


def _means(points: Tensor, members: Sequence[Group]) -> Tensor:
    if not members:
        return torch.zeros(0, points.shape[1])
    means = [points[torch.from_numpy(own).to(points.device)].mean(dim=0) for own in members]
    return torch.stack(means).float().cpu()
