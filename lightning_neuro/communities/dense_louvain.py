"""Louvain's method on a dense matrix, in float64.

Correlation graphs are dense: every second pair of units has an edge. On such graphs the sparse implementations in other
libraries spend their time in adjacency lists (0.2 to 0.4 s in C++ for 1,024 units). Here the weight from every unit to
every community is kept as a small dense table, which turns most of the work into a few matrix operations (0.02 to 0.04
s in NumPy, with the same modularity; `benchmarks/communities.py` measures it).
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

_MIN_GAIN = 1e-12  # in units of modularity: smaller gains are rounding, and following them might never end


def louvain(adjacency: Floats, resolution: float, rng: np.random.Generator) -> Labels:
    """Find the communities of a symmetric, non-negative (n, n) graph with at least one edge.

    Louvain with a second round of moves at every level during uncoarsening (multilevel refinement, Rotta and Noack,
    2011), so that units that were merged too early can still change their community.

    Args:
        adjacency: float64 (n, n).
        resolution: Resolution of the modularity.
        rng: Generator of the order of the nodes.

    Returns:
        int64 (n,), the community of each node.
    """
    return _multilevel(adjacency / adjacency.sum(), resolution, rng)


def _multilevel(adjacency: Floats, resolution: float, rng: np.random.Generator) -> Labels:
    strength = adjacency.sum(axis=1)
    labels = _merge_singletons(adjacency, strength, resolution, rng)
    labels = _move_units(adjacency, strength, labels, resolution, rng)
    links = _sum_by(labels, adjacency)
    if len(links) == len(labels):
        return labels
    labels = _multilevel(_sum_by(labels, links.T), resolution, rng)[labels]
    return _move_units(adjacency, strength, labels, resolution, rng)


def _merge_singletons(adjacency: Floats, strength: Floats, resolution: float, rng: np.random.Generator) -> Labels:
    """Make one pass from single nodes: each moves, in random order, to the community with the highest gain."""
    n = len(strength)
    labels = np.arange(n)
    totals = strength.copy()
    for i in rng.permutation(n).tolist():
        own = labels[i]
        totals[own] -= strength[i]
        gain = np.bincount(labels, weights=adjacency[i], minlength=n)
        gain[own] -= adjacency[i, i]
        gain -= (resolution * strength[i]) * totals
        best = gain.argmax()
        if gain[best] > gain[own] + _MIN_GAIN:
            labels[i] = best
        totals[labels[i]] += strength[i]
    return _renumber(labels)


def _move_units(
    adjacency: Floats, strength: Floats, labels: Labels, resolution: float, rng: np.random.Generator
) -> Labels:
    """Move single nodes while any move raises the modularity."""
    labels = labels.copy()
    nodes = np.arange(len(labels))
    links = _sum_by(labels, adjacency)  # (communities, n): weight from each node to each community
    totals = _sum_by(labels, strength)
    loops = adjacency.diagonal()
    while True:
        # All gains at once show which nodes would move; each gain is computed again before its move, because earlier
        # moves change it.
        gains = links - np.outer(resolution * totals, strength)
        stay = gains[labels, nodes] - loops + resolution * strength**2
        gains[labels, nodes] = stay
        moved = False
        for i in rng.permutation(np.flatnonzero(gains.max(axis=0) > stay + _MIN_GAIN)).tolist():
            own = labels[i]
            totals[own] -= strength[i]
            gain = links[:, i] - (resolution * strength[i]) * totals
            gain[own] -= loops[i]
            best = gain.argmax()
            if gain[best] > gain[own] + _MIN_GAIN:
                links[own] -= adjacency[i]
                links[best] += adjacency[i]
                labels[i] = best
                moved = True
            totals[labels[i]] += strength[i]
        if not moved:
            return _renumber(labels)


def _sum_by(labels: Labels, rows: Floats) -> Floats:
    """Sum of the rows of each community, by a sparse product: it reads each row once and copies none.

    Ten times as fast for 2,048 units as `np.add.reduceat`, and it uses one thread only, unlike a dense product.
    """
    from scipy.sparse import csr_matrix

    order = np.argsort(labels, kind="stable")
    ends = np.concatenate([[0], np.bincount(labels).cumsum()])
    summed: Floats = csr_matrix((np.ones(len(labels)), order, ends), shape=(len(ends) - 1, len(labels))) @ rows
    return summed


def _renumber(labels: Labels) -> Labels:
    return np.unique(labels, return_inverse=True)[1]
