"""DBSCAN by blocks of a matrix product."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_neuro.topology.inputs import check_whole

METRICS = ("euclidean", "cosine")
_ROWS = 192  # at a time, where one half of a symmetric matrix is computed
_BLOCK = 2**24  # distances at a time
_KEPT = 2**30  # pairs whose nearness is kept: one byte each
_PAIRS = 2**22  # numbers at a time where pairs are looked at one by one

Labels = npt.NDArray[np.int64]
Nearness = npt.NDArray[np.bool_]


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
    if m < min_samples:
        return np.full(m, -1, dtype=np.int64)
    cloud = _Cloud.of(points, eps, metric)
    if m * m <= _KEPT:
        kept = cloud.all_near()
        counts = kept.sum(axis=1)

        def near(rows: Labels) -> Nearness:
            return kept[rows]

    else:
        near = cloud.rows_near
        counts = np.concatenate([near(rows).sum(axis=1) for rows in _split(np.arange(m), m)])
    core = counts >= min_samples
    labels = _spread(near, core)
    border = np.full(m, m, dtype=np.int64)
    for rows in _split(np.nonzero(~core & (counts > 1))[0], m):
        pairs = np.nonzero(near(rows) & core)  # few: a row has less than min_samples
        np.minimum.at(border, rows[pairs[0]], labels[pairs[1]])
    return np.where((labels < 0) & (border < m), border, labels)


def _spread(near: Callable[[Labels], Nearness], core: Nearness) -> Labels:
    """Cluster of each core point, -1 for the others: from the first one to all in reach, then from the next one left.

    Each row of the matrix is looked at once, in as many steps as a cluster is wide: there is no list of pairs.
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


@dataclass(frozen=True)
class _Cloud:
    """Points ready for products: which of them are within the radius.

    The rounding error of the product is bounded; the few pairs that it leaves in doubt are measured one by one, in
    float64. So float32 points give the clusters of their float64 copies.
    """

    points: Tensor
    x: Tensor  # the points, conditioned
    norms: Tensor  # squared; for cosine 1, so that the product of two rows is compared with 1 - eps
    factor: int
    limit: float
    slack: float
    metric: str

    @classmethod
    def of(cls, points: Tensor, eps: float, metric: str) -> "_Cloud":
        x = _conditioned(points, metric)
        euclidean = metric == "euclidean"
        norms = x.square().sum(dim=1) if euclidean else x.new_full((len(x),), 0.5)
        slack = 4 * (x.shape[1] + 4) * torch.finfo(x.dtype).eps * max(float(norms.max()), 0.0 if euclidean else 1.0)
        return cls(points, x, norms, -2 if euclidean else -1, eps * eps if euclidean else eps, slack, metric)

    def all_near(self) -> Nearness:
        """The whole symmetric matrix, of which one half is computed."""
        m = len(self.x)
        near = torch.empty(m, m, dtype=torch.bool, device=self.x.device)
        for start in range(0, m, _ROWS):
            rows = torch.arange(start, min(start + _ROWS, m), device=self.x.device)
            part = self._near(rows, start)
            near[start : start + _ROWS, start:] = part
            near[start:, start : start + _ROWS] = part.T
        result: Nearness = near.cpu().numpy()
        return result

    def rows_near(self, rows: Labels) -> Nearness:
        """Some rows of the matrix."""
        result: Nearness = self._near(torch.from_numpy(rows).to(self.x.device), 0).cpu().numpy()
        return result

    def _near(self, rows: Tensor, start: int) -> Tensor:
        """Which of the points from `start` on are within the radius of each of the rows."""
        others = self.x[start:]
        half = torch.addmm(self.norms[start:], self.x[rows], others.T, alpha=self.factor)
        rest = (self.limit - self.norms[rows])[:, None]
        near = half <= rest + self.slack
        sure = half <= rest - self.slack
        if not torch.equal(near, sure):
            doubtful = torch.nonzero(near ^ sure)
            for pairs in torch.split(doubtful, max(1, _PAIRS // self.x.shape[1])):
                a, b = self.points[rows[pairs[:, 0]]], self.points[start + pairs[:, 1]]
                near[pairs[:, 0], pairs[:, 1]] = _exactly(a, b, self.metric) <= self.limit
        return near


def _conditioned(points: Tensor, metric: str) -> Tensor:
    """Points whose products give distances with few digits lost: centred, or of length 1 (0 for a zero vector)."""
    if not _products_are_exact():
        points = points.double()
    if metric == "cosine":
        return unit_length(points.double()).to(points.dtype)
    centred = points - points.mean(dim=0)
    # The square of a float32 beyond 1e19 is infinite.
    return centred if centred.square().sum(dim=1).isfinite().all() else points.double() - points.double().mean(dim=0)


def _products_are_exact() -> bool:
    """Whether float32 products keep their digits; the user may have let them be rounded to far fewer."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch refuses to say where some `torch.backends...fp32_precision` was set
        return False


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
