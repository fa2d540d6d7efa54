"""DBSCAN on blocks of a matrix product.

scikit-learn's DBSCAN gives the same labels. On the many small intervals of a Mapper graph it takes 1.7 times as long
for 512 points of 64 units and 2.6 times for 30,000 points of 512 units (one core; the table is in docs/topology.md),
and it does not run on a GPU.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_neuro.topology.options import Distance

_ROWS = 192  # rows at a time, if one half of a symmetric matrix is computed
_BLOCK = 2**24  # distances at a time
_KEPT = 2**30  # maximum number of pairs that are kept, as one byte each
_PAIRS = 2**22  # numbers at a time, if pairs are compared one by one

Labels = npt.NDArray[np.int64]
Near = npt.NDArray[np.bool_]


def dbscan(points: Tensor, *, eps: float, min_samples: int, distance: Distance = "euclidean") -> Labels:
    """Cluster points by density, with the same labels as scikit-learn's DBSCAN.

    A core point has at least `min_samples` points within `eps`, itself included. Core points within `eps` of each other
    share a cluster. Any other point within `eps` of a core point joins the first such cluster. The rest is noise.

    Args:
        points: (m, units) finite float32 or float64.
        eps: Radius, inclusive, at least 0.
        min_samples: Number of points that make a neighbourhood dense.
        distance: `"euclidean"` or `"cosine"`. A zero vector has the cosine distance 1 to all points, itself included.

    Returns:
        int64 (m,): clusters numbered by their first core point; -1 for noise.
    """
    m = len(points)
    if m < min_samples:
        return np.full(m, -1, dtype=np.int64)
    within = _neighbourhoods(points, eps, distance)
    if m * m <= _KEPT:
        kept = _all_pairs(within, m, points.device)
        counts = kept.sum(axis=1)

        def near(rows: Labels) -> Near:
            return kept[rows]

    else:

        def near(rows: Labels) -> Near:
            found: Near = within(torch.from_numpy(rows).to(points.device), 0).cpu().numpy()
            return found

        counts = np.concatenate([near(rows).sum(axis=1) for rows in _split(np.arange(m), m)])
    core = counts >= min_samples
    labels = _spread(near, core)
    border = np.full(m, m, dtype=np.int64)
    for rows in _split(np.nonzero(~core & (counts > 1))[0], m):
        pairs = np.nonzero(near(rows) & core)  # few: a row has fewer than min_samples
        np.minimum.at(border, rows[pairs[0]], labels[pairs[1]])
    return np.where((labels < 0) & (border < m), border, labels)


def _spread(near: Callable[[Labels], Near], core: Near) -> Labels:
    """The cluster of each core point, -1 for other points: all core points reachable from the first one, and so on.

    Each row of the matrix is read once, in as many steps as a cluster is wide; no list of pairs is built.
    """
    labels = np.full(len(core), -1, dtype=np.int64)
    left = core.copy()
    cluster = 0
    while (first := int(left.argmax())) < len(left) and left[first]:
        frontier = np.array([first])
        left[first] = False
        while len(frontier):
            labels[frontier] = cluster
            reached = np.zeros_like(left)
            for rows in _split(frontier, len(left)):
                reached |= near(rows).any(axis=0)
            frontier = np.nonzero(reached & left)[0]
            left[frontier] = False
        cluster += 1
    return labels


def _split(rows: Labels, m: int) -> list[Labels]:
    size = max(1, _BLOCK // m)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _all_pairs(within: Callable[[Tensor, int], Tensor], m: int, device: torch.device) -> Near:
    """The whole symmetric matrix, of which only one half is computed."""
    near = torch.empty(m, m, dtype=torch.bool, device=device)
    for start in range(0, m, _ROWS):
        rows = torch.arange(start, min(start + _ROWS, m), device=device)
        part = within(rows, start)
        near[start : start + _ROWS, start:] = part
        near[start:, start : start + _ROWS] = part.T
    result: Near = near.cpu().numpy()
    return result


def _neighbourhoods(points: Tensor, eps: float, distance: Distance) -> Callable[[Tensor, int], Tensor]:
    """A function (rows, start) -> bool (rows, m - start): which of the points from `start` on are within the radius.

    The rounding error of the matrix product is bounded; the few pairs that are within this bound of the radius are
    measured one by one, in float64. So float32 points give the clusters of their float64 copies.
    """
    x = _conditioned(points, distance)
    euclidean = distance == "euclidean"
    # For cosine distances they sum to 1, so that the product of two rows is compared with 1 - eps.
    norms = x.square().sum(dim=1) if euclidean else x.new_full((len(x),), 0.5)
    factor, limit = (-2, eps * eps) if euclidean else (-1, eps)
    slack = 4 * (x.shape[1] + 4) * torch.finfo(x.dtype).eps * max(float(norms.max()), 0.0 if euclidean else 1.0)

    def within(rows: Tensor, start: int) -> Tensor:
        half = torch.addmm(norms[start:], x[rows], x[start:].T, alpha=factor)
        rest = (limit - norms[rows])[:, None]
        near = half <= rest + slack
        sure = half <= rest - slack
        if not torch.equal(near, sure):
            doubtful = torch.nonzero(near ^ sure)
            for pairs in torch.split(doubtful, max(1, _PAIRS // x.shape[1])):
                a, b = points[rows[pairs[:, 0]]], points[start + pairs[:, 1]]
                near[pairs[:, 0], pairs[:, 1]] = _exactly(a, b, distance) <= limit
        return near

    return within


def _conditioned(points: Tensor, distance: Distance) -> Tensor:
    """Points whose products give accurate distances: centred, or scaled to length 1 (0 for a zero vector)."""
    if not _products_are_exact():
        points = points.double()
    if distance == "cosine":
        return unit_length(points.double()).to(points.dtype)
    centred = points - points.mean(dim=0)
    # The square of a float32 above 1e19 is infinite.
    return centred if centred.square().sum(dim=1).isfinite().all() else points.double() - points.double().mean(dim=0)


def _products_are_exact() -> bool:
    """Whether float32 products have full precision; the user may have allowed torch to use less."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch raises if some `torch.backends...fp32_precision` was set
        return False


def unit_length(points: Tensor) -> Tensor:
    """The rows scaled to length 1; zero rows stay zero."""
    norms = points.norm(dim=1, keepdim=True)
    return points / torch.where(norms > 10 * torch.finfo(torch.float64).eps, norms, 1)  # as scikit-learn does


def _exactly(a: Tensor, b: Tensor, distance: Distance) -> Tensor:
    a, b = a.double(), b.double()
    return (a - b).square().sum(dim=1) if distance == "euclidean" else 1 - (unit_length(a) * unit_length(b)).sum(dim=1)
