"""The default radius of the clusters: a knee in the points' distances to their neighbours."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_neuro.topology.clustering import unit_length
from lightning_neuro.topology.options import Distance

MAX_QUERIES = 5000
LEAST_CORE = 0.9
MARGIN = 1e-4
_BLOCK = 2**23

Radii = npt.NDArray[np.float64]
Group = npt.NDArray[np.int64]


def adaptive_eps(
    points: Tensor, groups: Sequence[Group], *, min_samples: int, distance: Distance = "euclidean"
) -> float:
    """Estimate a radius that leaves few points as noise: the knee of the radii at which points become core points.

    For each point (of more than 5,000, a random choice) the radius is computed within which it has `min_samples`
    points, itself included, in the interval in which this radius is smallest. The result is the knee of the sorted
    radii, beyond which they rise steeply, but at least the radius at which nine tenths of the points are core points.

    Args:
        points: (N, units), finite.
        groups: The points of each interval, as indices.
        min_samples: Number of points that make a neighbourhood dense.
        distance: `"euclidean"` or `"cosine"`.

    Returns:
        The radius; 0 if no interval has `min_samples` points, or points coincide.
    """
    radii = core_radii(points, groups, min_samples=min_samples, distance=distance)
    if len(radii) == 0:
        return 0.0
    at = max(knee(radii), int(np.ceil(LEAST_CORE * len(radii))) - 1)
    # Not exactly the radius of a point, because whether this point is inside would depend on the last digit.
    return float(radii[at]) * (1 + MARGIN)


def core_radii(points: Tensor, groups: Sequence[Group], *, min_samples: int, distance: Distance) -> Radii:
    """The radius at which each queried point becomes a core point in one of its intervals, ascending."""
    asked = np.ones(len(points), dtype=bool)
    if len(points) > MAX_QUERIES:
        chosen = np.random.default_rng(0).permutation(len(points))[:MAX_QUERIES]
        asked[:] = False
        asked[chosen] = True
    radii = np.full(len(points), np.inf)
    for group in groups:
        queries = group[asked[group]]
        if len(group) >= min_samples and len(queries) > 0:
            radii[queries] = np.minimum(radii[queries], _kth_distances(points, queries, group, min_samples, distance))
    return np.sort(radii[np.isfinite(radii)])


def _kth_distances(points: Tensor, queries: Group, group: Group, k: int, distance: Distance) -> Radii:
    x = points[torch.from_numpy(group).to(points.device)].double()
    q = points[torch.from_numpy(queries).to(points.device)].double()
    euclidean = distance == "euclidean"
    if not euclidean:
        x, q = unit_length(x), unit_length(q)
    found = []
    # Distances between coinciding points are rounding errors; see `distance_matrix`.
    least = 1e-7 * q.norm(dim=1) if euclidean else torch.full_like(q[:, 0], 1e-14)
    for rows in torch.split(q, max(1, _BLOCK // len(x))):
        distances = torch.cdist(rows, x) if euclidean else 1 - rows @ x.T
        found.append(distances.topk(k, dim=1, largest=False).values[:, -1].clamp(min=0))
    radii = torch.cat(found)
    result: Radii = torch.where(radii <= least, 0, radii).cpu().numpy()
    return result


def knee(ascending: Radii) -> int:
    """Index of the point of a rising curve that lies farthest below the line from its first to its last point."""
    rise = ascending[-1] - ascending[0]
    if rise <= 0:
        return len(ascending) - 1
    line = np.linspace(0, 1, len(ascending))
    return int(np.argmax(line - (ascending - ascending[0]) / rise))
