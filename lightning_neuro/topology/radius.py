"""The radius of the clusters, where none is given: one knee of the points' distances to their neighbours."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_neuro.topology.clustering import unit_length

MAX_QUERIES = 5000
LEAST_COMPANY = 0.9
MARGIN = 1e-4
_BLOCK = 2**23

Distances = npt.NDArray[np.float64]
Group = npt.NDArray[np.int64]


def adaptive_eps(points: Tensor, groups: Sequence[Group], *, min_samples: int, metric: str = "euclidean") -> float:
    """A radius that leaves few points alone: the knee of the distances at which points become core points.

    For each point (5,000 random ones of more) it takes the radius at which it would have `min_samples` points around
    it, itself included, in the interval where this is smallest. The knee of the sorted radii, beyond which they shoot
    up, is the result; but where the curve bends early, the radius that serves nine tenths of the points.

    Args:
        points: (N, units), finite.
        groups: The points of each interval, as indices.
        min_samples: Points that make a neighbourhood dense.
        metric: `"euclidean"` or `"cosine"`.

    Returns:
        The radius; 0 where no interval has `min_samples` points, or points coincide.
    """
    radii = core_radii(points, groups, min_samples=min_samples, metric=metric)
    if len(radii) == 0:
        return 0.0
    at = max(knee(radii), int(np.ceil(LEAST_COMPANY * len(radii))) - 1)
    # Not on the radius of a point: whether that point is inside would hang on the last digit.
    return float(radii[at]) * (1 + MARGIN)


def core_radii(points: Tensor, groups: Sequence[Group], *, min_samples: int, metric: str) -> Distances:
    """The radius at which each point asked becomes a core point in one of its intervals, ascending."""
    asked = np.ones(len(points), dtype=bool)
    if len(points) > MAX_QUERIES:
        chosen = np.random.default_rng(0).permutation(len(points))[:MAX_QUERIES]
        asked[:] = False
        asked[chosen] = True
    radii = np.full(len(points), np.inf)
    for group in groups:
        queries = group[asked[group]]
        if len(group) >= min_samples and len(queries) > 0:
            radii[queries] = np.minimum(radii[queries], _kth_distances(points, queries, group, min_samples, metric))
    return np.sort(radii[np.isfinite(radii)])


def _kth_distances(points: Tensor, queries: Group, group: Group, k: int, metric: str) -> Distances:
    x = points[torch.from_numpy(group).to(points.device)].double()
    q = points[torch.from_numpy(queries).to(points.device)].double()
    if metric == "cosine":
        x, q = unit_length(x), unit_length(q)
    found = []
    # What rounding leaves between coinciding points is no radius; see `distance_matrix`.
    least = 1e-7 * q.norm(dim=1) if metric == "euclidean" else torch.full_like(q[:, 0], 1e-14)
    for rows in torch.split(q, max(1, _BLOCK // len(x))):
        distances = torch.cdist(rows, x) if metric == "euclidean" else 1 - rows @ x.T
        found.append(distances.topk(k, dim=1, largest=False).values[:, -1].clamp(min=0))
    radii = torch.cat(found)
    result: Distances = torch.where(radii <= least, 0, radii).cpu().numpy()
    return result


def knee(ascending: Distances) -> int:
    """Index of the point of a rising curve that lies farthest below the line from its first to its last point."""
    rise = ascending[-1] - ascending[0]
    if rise <= 0:
        return len(ascending) - 1
    line = np.linspace(0, 1, len(ascending))
    return int(np.argmax(line - (ascending - ascending[0]) / rise))
