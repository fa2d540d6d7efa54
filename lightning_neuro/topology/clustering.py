"""DBSCAN by blocks of a matrix product."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_neuro.topology.inputs import check_whole

METRICS = ("euclidean", "cosine")
_BLOCK = 2**24  # distances at a time
_KEPT = 2**28  # pairs whose nearness is kept between the two looks at them
_PAIRS = 2**22  # numbers at a time where pairs are looked at one by one

Labels = npt.NDArray[np.int64]


def dbscan(points: Tensor, *, eps: float, min_samples: int, metric: str = "euclidean") -> Labels:
    """Cluster points by density, with the very labels of scikit-learn's DBSCAN.

    A core point has at least `min_samples` points within `eps`, itself included; core points within `eps` of each other
    share a cluster; any other point within `eps` of a core point joins the first such cluster; the rest is noise.

    Args:
        points: (m, units) finite float32 or float64.
        eps: Radius, inclusive, at least 0.
        min_samples: Points that make a neighbourhood dense.
        metric: `"euclidean"` or `"cosine"`. By cosine a zero vector has distance 1 from all, itself included.

    Returns:
        int64 (m,): clusters numbered by their first core point; -1 for noise.
    """
    m = len(points)
    labels = np.full(m, -1, dtype=np.int64)
    if m < min_samples:
        return labels
    kept = list(_near(points, eps, metric)) if m * m <= _KEPT else None
    counts = torch.cat([near.sum(dim=1) for _, near in kept or _near(points, eps, metric)])
    core = counts >= min_samples
    if not core.any():
        return labels
    members = torch.nonzero(core).flatten().cpu().numpy()
    labels[members] = _components(kept or _near(points, eps, metric), core, members)
    border = np.full(m, m, dtype=np.int64)
    for start, near in kept or _near(points, eps, metric):
        rows = torch.nonzero(~core[start : start + len(near)]).flatten()
        pairs = torch.nonzero(near[rows] & core).cpu().numpy()  # few: a row has less than min_samples
        np.minimum.at(border, rows.cpu().numpy()[pairs[:, 0]] + start, labels[pairs[:, 1]])
    return np.where((labels < 0) & (border < m), border, labels)


def _components(near_blocks: Any, core: Tensor, members: Labels) -> Labels:
    """Cluster of each core point: connected components, joined block by block."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    m = len(core)
    everyone = np.arange(m)
    labels = everyone
    for start, near in near_blocks:
        linked = near & core & core[start : start + len(near), None]
        pairs = torch.nonzero(linked.triu(start + 1)).cpu().numpy()
        first = np.unique(labels, return_index=True)[1]
        sources = np.concatenate([pairs[:, 0] + start, everyone])
        links = np.concatenate([pairs[:, 1], first[labels]])
        graph = csr_matrix((np.ones(len(links), dtype=np.int8), (sources, links)), shape=(m, m))
        labels = connected_components(graph, directed=False)[1]
    # Numbered by their first core point.
    _, first, inverse = np.unique(labels[members], return_index=True, return_inverse=True)
    numbered: Labels = np.argsort(np.argsort(first))[inverse]
    return numbered


def _near(points: Tensor, eps: float, metric: str) -> Iterator[tuple[int, Tensor]]:
    """First row and (rows, m) bool, block by block: which pairs are within eps.

    The rounding error of the matrix product is bounded; the few pairs that it leaves in doubt are measured one by one,
    in float64. So float32 points give the clusters of their float64 copies.
    """
    limit = eps * eps if metric == "euclidean" else eps
    x = _conditioned(points, metric)
    norms = x.square().sum(dim=1) if metric == "euclidean" else x.new_ones(len(x))
    slack = 4 * (x.shape[1] + 4) * torch.finfo(x.dtype).eps * float(norms.max())
    rows = max(1, _BLOCK // len(x))
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        distances = torch.addmm(norms, part, x.T, alpha=-2 if metric == "euclidean" else -1)
        if metric == "euclidean":
            distances += norms[start : start + rows, None]
        near = distances <= limit + slack
        doubtful = torch.nonzero(near & (distances > limit - slack))
        for pairs in torch.split(doubtful, max(1, _PAIRS // x.shape[1])):
            exact = _exactly(points[pairs[:, 0] + start], points[pairs[:, 1]], metric)
            near[pairs[:, 0], pairs[:, 1]] = exact <= limit
        yield start, near


def _conditioned(points: Tensor, metric: str) -> Tensor:
    """Points whose products give distances with few digits lost: centred, or of length 1 (0 for a zero vector)."""
    if torch.get_float32_matmul_precision() != "highest":
        points = points.double()  # the user lets float32 products be rounded to far fewer digits
    if metric == "cosine":
        return unit_length(points.double()).to(points.dtype)
    centred = points - points.mean(dim=0)
    # The square of a float32 beyond 1e19 is infinite.
    return centred if centred.square().sum(dim=1).isfinite().all() else points.double() - points.double().mean(dim=0)


def unit_length(points: Tensor) -> Tensor:
    """The rows scaled to length 1; zero rows stay zero."""
    norms = points.norm(dim=1, keepdim=True)
    return points / torch.where(norms > 10 * torch.finfo(torch.float64).eps, norms, 1)  # as scikit-learn does


def _exactly(a: Tensor, b: Tensor, metric: str) -> Tensor:
    a, b = a.double(), b.double()
    return (a - b).square().sum(dim=1) if metric == "euclidean" else 1 - (unit_length(a) * unit_length(b)).sum(dim=1)


def check_clustering(metric: Any, eps: Any, min_samples: Any) -> None:
    """Refuse options that DBSCAN cannot work with.

    Raises:
        ValueError: Naming the argument.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(map(repr, METRICS))}, but it is {metric!r}.")
    check_whole("min_samples", min_samples, at_least=1)
    number = isinstance(eps, (int, float)) and not isinstance(eps, bool)
    if eps is not None and not (number and 0 <= eps < float("inf")):
        raise ValueError(f"eps must be None or a finite number of at least 0, but it is {eps!r}.")
