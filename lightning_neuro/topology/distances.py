"""Exact distances between points, their scale, and the lengths of their minimum spanning tree."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

SCALE_QUANTILE = 0.9
_ROWS = 512  # rows at a time; one half of the matrix is computed

Matrix = npt.NDArray[np.float64]
Pairs = npt.NDArray[np.float64]


def distance_matrix(points: Tensor) -> Matrix:
    """Euclidean distances of finite (N, units) points: float64, exactly symmetric, no negative entry, zero diagonal."""
    x = points.double()
    x = x - x.mean(dim=0)
    norms = x.square().sum(dim=1)
    distances = x.new_empty(len(x), len(x))
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        sums = norms[rows, None] + norms[start:]
        squared = torch.addmm(sums, x[rows], x[start:].T, alpha=-2)
        # Rounding leaves distances of 1e-8 of their norm between coinciding points, which would become bars.
        part = squared.masked_fill_(squared <= 1e-14 * sums, 0).sqrt_()
        corner = part[:, : len(part)]
        corner.copy_(corner.triu(1) + corner.triu(1).T)  # the product is not symmetric to the last digit
        distances[rows, start:] = part
        distances[start:, rows] = part.T
    result: Matrix = distances.cpu().numpy()
    return result


def pairs_of(distances: Matrix) -> Pairs:
    """The entries above the diagonal, row after row: scipy's condensed form."""
    rows = [row[i + 1 :] for i, row in enumerate(distances)]
    return np.concatenate(rows) if rows else np.zeros(0)


def scale_of(pairs: Pairs) -> float:
    """The .9 quantile of condensed distances; 1 if it is 0 (nearly all points coincide).

    Lengths are divided by it, so that rescaling a cloud does not change its measures.
    """
    scale = float(np.quantile(pairs, SCALE_QUANTILE)) if len(pairs) else 0.0
    return scale if scale > 0 else 1.0


def tree_lengths(pairs: Pairs) -> Pairs:
    """Edge lengths of a minimum spanning tree of condensed distances, ascending, (N - 1,), by single linkage."""
    from scipy.cluster.hierarchy import linkage

    lengths: Pairs = linkage(pairs, "single")[:, 2] if len(pairs) else np.zeros(0)
    return lengths
