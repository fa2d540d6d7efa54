"""Exact distances between points, and the trees that hold together what is close."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

SCALE_QUANTILE = 0.9
_ROWS = 512  # at a time: one half of the matrix is computed

Matrix = npt.NDArray[np.float64]


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
        # What rounding leaves between coinciding points, 1e-8 of their norm, would be bars of that length.
        part = squared.masked_fill_(squared <= 1e-14 * sums, 0).sqrt_()
        corner = part[:, : len(part)]
        corner.copy_(corner.triu(1) + corner.triu(1).T)  # the product is not symmetric to the last digit
        distances[rows, start:] = part
        distances[start:, rows] = part.T
    result: Matrix = distances.cpu().numpy()
    return result


def pairs_of(distances: Matrix) -> Matrix:
    """The entries above the diagonal, row after row."""
    rows = [row[i + 1 :] for i, row in enumerate(distances)]
    return np.concatenate(rows) if rows else np.zeros(0)


def scale_of(distances: Matrix) -> float:
    """The length by which distances are divided, so that a cloud that only grows keeps its shape: their .9 quantile.

    1 where this is 0 (the points all but coincide).
    """
    pairs = pairs_of(distances)
    scale = float(np.quantile(pairs, SCALE_QUANTILE, overwrite_input=True)) if len(pairs) else 0.0
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
