"""Mapper: the shape of a cloud of points as a graph of overlapping clusters."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_neuro.topology.clustering import check_clustering, dbscan
from lightning_neuro.topology.cover import Lens, check_cover, default_intervals, intervals_of, lens_values
from lightning_neuro.topology.graph import MapperGraph
from lightning_neuro.topology.inputs import as_labels, as_points, finite_rows
from lightning_neuro.topology.radius import adaptive_eps

Group = npt.NDArray[np.int64]


def mapper(
    points: Any,
    *,
    lens: Lens = "l2",
    intervals: int | None = None,
    overlap: float = 0.3,
    cover: str = "uniform",
    metric: str = "euclidean",
    eps: float | None = None,
    min_samples: int = 5,
    targets: Any = None,
) -> MapperGraph:
    """Summarise a cloud of points as a graph: its pieces, branches and loops.

    A lens gives each point one number. Overlapping intervals cover the numbers; inside each interval the points are
    clustered by DBSCAN; a cluster is a node, and nodes that share points are joined. Read it as a map: which samples
    lie together, and how groups hang together as the lens value grows. Do not read small features: a loop or a branch
    of few points comes and goes with the parameters, and with chance.

    On the same parameters nodes and edges are those of KeplerMapper with scikit-learn's DBSCAN, except that a lens of
    one value only has one interval here.

    Args:
        points: (N, units) NumPy array or tensor; on a CUDA tensor the distances are computed there. Rows with NaN or
            infinity are counted and left out.
        lens: `"l2"` (norm), `"l1"`, `"knn"` (distance to the fifth nearest other point), `"pc1"` (first principal
            component), or a function of the finite points that gives one number for each.
        intervals: How many; default: the cube root of N, rounded up.
        overlap: Share of its width that an interval shares with the next, at least 0 and below 1.
        cover: `"uniform"` (intervals of equal width) or `"quantile"` (of equally many points).
        metric: `"euclidean"` or `"cosine"` distance.
        eps: Radius of DBSCAN; default: one knee for the whole cloud, see `adaptive_eps`.
        min_samples: Points within `eps`, itself included, that make a point a core point.
        targets: (N,) integer class labels, negative where there is none.

    Returns:
        The graph; without nodes where no interval has `min_samples` points close together. Points that all coincide
        are one node.

    Raises:
        ValueError: For a wrong argument, naming it.

    Source:
        G. Singh, F. Mémoli, G. Carlsson (2007); for activations: A. Rathore, N. Chalapathi, S. Palande, B. Wang,
        "TopoAct: Visually Exploring the Shape of Activations in Deep Learning", arXiv 1912.06332 (2021).

    Example:
        >>> import torch
        >>> angle = torch.linspace(0, 6.2832, 201)[:-1]
        >>> circle = torch.stack([angle.cos(), angle.sin()], dim=1)
        >>> graph = mapper(circle, lens=lambda points: points[:, 0], intervals=6, eps=0.1)
        >>> graph.num_nodes, graph.num_edges, graph.loops
        (10, 10, 1)
    """
    check_cover(lens, intervals, overlap, cover)
    check_clustering(metric, eps, min_samples)
    points = as_points(points)
    labels = as_labels(targets, len(points))
    finite = finite_rows(points)
    kept = points[finite] if len(finite) < len(points) else points

    values = lens_values(kept, lens)
    wanted = default_intervals(len(kept)) if intervals is None else intervals
    lower, upper = intervals_of(values, intervals=wanted, overlap=overlap, cover=cover)
    groups = [np.nonzero((values >= a) & (values <= b))[0] for a, b in zip(lower, upper, strict=True)]
    if eps is None:
        eps = adaptive_eps(kept, groups, min_samples=min_samples, metric=metric)
    members, interval = _nodes(kept, groups, eps, min_samples, metric)
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
        min_samples=min_samples,
        targets=labels,
    )


def _nodes(
    points: Tensor, groups: Sequence[Group], eps: float, min_samples: int, metric: str
) -> tuple[list[Group], list[int]]:
    members, interval = [], []
    for number, group in enumerate(groups):
        inside = points[torch.from_numpy(group).to(points.device)]
        labels = dbscan(inside, eps=eps, min_samples=min_samples, metric=metric)
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
