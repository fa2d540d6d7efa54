"""Exact distances between points, and the trees that hold together what is close."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

SCALE_QUANTILE = 0.9

Matrix = npt.NDArray[np.float64]


def distance_matrix(points: Tensor) -> Matrix:
    """Euclidean distances of finite (N, units) points: float64, exactly symmetric, no negative entry, zero diagonal."""
    x = points.double()
    x = x - x.mean(dim=0)
    norms = x.square().sum(dim=1)
    squared = torch.addmm(norms, x, x.T, alpha=-2).add_(norms[:, None]).clamp_(min=0)
    # What rounding leaves between coinciding points, 1e-8 of their norm, would be bars of that length.
    squared[squared <= 1e-14 * (norms + norms[:, None])] = 0
    upper = squared.sqrt_().triu_(1)
    result: Matrix = (upper + upper.T).cpu().numpy()
    return result


def scale_of(distances: Matrix) -> float:
    """The length by which distances are divided, so that a cloud that only grows keeps its shape: their .9 quantile.

    1 where this is 0 (the points all but coincide).
    """
    pairs = distances[np.triu_indices(len(distances), 1)]
    scale = float(np.quantile(pairs, SCALE_QUANTILE)) if len(pairs) else 0.0
    return scale if scale > 0 else 1.0


def tree_lengths(distances: Matrix) -> Matrix:
    """The edge lengths of a minimum spanning tree of a dense (N, N) distance matrix, ascending, (N - 1,).

    Prim's algorithm, one row at a time: N vector operations of length N. Zero distances are edges like any other, which
    sparse formats would read as "no edge".
    """
    n = len(distances)
    lengths = np.empty(max(n - 1, 0))
    outside = np.ones(n, dtype=bool)
    nearest = np.full(n, np.inf)
    current = 0
    for step in range(n - 1):
        outside[current] = False
        nearest[current] = np.inf
        np.minimum(nearest, distances[current], out=nearest, where=outside)
        current = int(nearest.argmin())
        lengths[step] = nearest[current]
    lengths.sort()
    return lengths
