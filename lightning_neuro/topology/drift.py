"""Topological drift: how much the shape of a cloud of points changed between two evaluations (RTD-Lite)."""

import numpy as np
from torch import Tensor

from lightning_neuro.checks import ArrayLike, as_activations, finite_rows, require
from lightning_neuro.topology.distances import Pairs, distance_matrix, pairs_of, scale_of, tree_lengths


def topological_drift(a: ArrayLike, b: ArrayLike) -> float:
    """Measure how much two clouds of the same points differ in the way their points are connected (RTD-Lite).

    Distances are first divided by their .9 quantile. The minimum spanning tree of the elementwise minimum of both
    distance matrices is no longer than that of either cloud; the drift is how much longer the two trees are, on
    average. It is 0 if the distances differ only by a common factor, and grows with the number of points N, to at most
    N (in units of the scale).

    Args:
        a: (N, units) NumPy array or tensor.
        b: (N, other units), the same points in another layer or at another time.

    Returns:
        The mean of (tree length of a) - (tree length of both) and (tree length of b) - (tree length of both). Points
        that are not finite in one of the clouds are left out of both.

    Raises:
        ArgumentError: If the clouds do not have the same number of points, or fewer than 2 finite ones in common.

    Source:
        RTD-Lite: E. Tulchinskii et al. (2025), after S. Barannikov et al., "Representation Topology Divergence",
        arXiv 2201.00058 (ICML 2022).

    Example:
        >>> import torch
        >>> cloud = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> round(topological_drift(cloud, 7 * cloud), 6)
        0.0
    """
    a, b = as_activations(a, name="a"), as_activations(b, name="b")
    require(len(a) == len(b), "b", f"hold the same {len(a)} points as `a`", b)
    finite = finite_rows(a).cpu() & finite_rows(b).cpu()
    shared = int(finite.sum())
    require(shared >= 2, "b", "share at least 2 finite points with `a`", shared)
    clouds = (points[finite.to(points.device)] for points in (a, b))
    return drift_of_pairs(*(scaled(pairs_of(distance_matrix(points))) for points in clouds))


def scaled(pairs: Pairs) -> Pairs:
    """Condensed distances divided by their .9 quantile."""
    result: Pairs = pairs / scale_of(pairs)
    return result


def drift_of_pairs(a: Pairs, b: Pairs) -> float:
    """The drift between two vectors of scaled condensed distances of the same points."""
    both = tree_lengths(np.minimum(a, b)).sum()
    return float(max(0.0, (tree_lengths(a).sum() + tree_lengths(b).sum()) / 2 - both))


def drift_between(a: Tensor, b: Tensor) -> float:
    """The drift between two float32 vectors from `TopologyResult.drift_distances`."""
    return drift_of_pairs(a.double().numpy(), b.double().numpy())
