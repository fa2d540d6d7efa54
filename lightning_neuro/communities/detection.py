"""From a weighted graph to communities: the best of several runs, modularity, and agreement between partitions."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_neuro.checks import ArrayLike, check_int, check_number, require
from lightning_neuro.communities.algorithms import make_runner
from lightning_neuro.communities.dense_louvain import Floats, Labels


@dataclass(frozen=True, eq=False)
class Communities:
    """A partition of a graph's nodes into communities.

    Attributes:
        labels: int64 (k,), the community of each node; 0 is the largest.
        modularity: Modularity of `labels`, the best of all runs.
        modularities: One value per run.
        agreement: Mean normalised mutual information between the partitions of the runs: 1 if all runs found the same
            communities, near 0 if the partitions are unrelated. NaN for a single run.
    """

    labels: Tensor
    modularity: float
    modularities: tuple[float, ...]
    agreement: float


def detect_communities(
    adjacency: Tensor,
    algorithm: str = "louvain",
    *,
    resolution: float = 1.0,
    num_runs: int = 5,
    algorithm_options: Mapping[str, Any] | None = None,
) -> Communities:
    """Partition a graph into communities and keep the best of several runs.

    Args:
        adjacency: (k, k) real, symmetric, non-negative, with a zero diagonal and at least one positive weight.
        algorithm: `"louvain"`, or the name of any crisp (non-overlapping) algorithm of `cdlib.algorithms`.
        resolution: Above 1: more and smaller communities; below 1: fewer and larger ones.
        num_runs: Number of runs, each with its own random order of the nodes.
        algorithm_options: Further arguments of a cdlib algorithm.

    Returns:
        The best partition, and the agreement between the runs.

    Raises:
        ArgumentError: If an argument is invalid, or the graph has no positive weight.

    Source:
        V. Blondel et al., "Fast unfolding of communities in large networks" (2008); R. Rotta, A. Noack, "Multilevel
        local search algorithms for modularity clustering" (2011); G. Rossetti et al., CDlib (2019).

    Example:
        >>> import torch
        >>> cliques = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)) - torch.eye(6)
        >>> found = detect_communities(cliques)
        >>> found.labels.tolist(), found.modularity, found.agreement
        ([0, 0, 0, 1, 1, 1], 0.5, 1.0)
    """
    check_resolution(resolution)
    check_int("num_runs", num_runs, minimum=1)
    weights = check_adjacency(adjacency)
    run = make_runner(algorithm, resolution, algorithm_options or {})
    runs = [run(weights, seed) for seed in range(num_runs)]
    qualities = tuple(weighted_modularity(weights, labels, resolution) for labels in runs)
    agreements = [_agreement(a, b) for a, b in combinations(runs, 2)]
    best = int(np.argmax(qualities))
    return Communities(
        labels=torch.from_numpy(_largest_first(runs[best])),
        modularity=qualities[best],
        modularities=qualities,
        agreement=float(np.mean(agreements)) if agreements else float("nan"),
    )


def modularity(adjacency: Tensor, labels: ArrayLike, *, resolution: float = 1.0) -> float:
    """Newman's weighted modularity: how much more weight lies inside communities than the null model expects.

    Q = (1 / 2m) sum_ij [A_ij - resolution s_i s_j / 2m] [c_i = c_j], where s_i is the sum of the weights of node i, 2m
    the sum of all s_i, and c_i the community of node i. 0 means no more than expected from the strengths s_i, and 1 is
    the upper bound. Sparse graphs and few samples give high values by chance: compare it with a null.

    Args:
        adjacency: (k, k) real, symmetric, non-negative, with a zero diagonal and at least one positive weight.
        labels: (k,) integers, the community of each node.
        resolution: Weight of the expected part.

    Returns:
        Q.

    Raises:
        ArgumentError: If an argument is invalid.

    Source:
        M. Newman, "Analysis of weighted networks" (2004).

    Example:
        >>> import torch
        >>> cliques = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)) - torch.eye(6)
        >>> modularity(cliques, torch.tensor([0, 0, 0, 1, 1, 1]))
        0.5
    """
    check_resolution(resolution)
    weights = check_adjacency(adjacency)
    return weighted_modularity(weights, _as_partition("labels", labels, len(weights)), resolution)


def partition_agreement(labels_a: ArrayLike, labels_b: ArrayLike) -> float:
    """Normalised mutual information of two partitions of the same nodes: 1 if they are equal, 0 if independent.

    Args:
        labels_a: (k,) integers; how the communities are numbered does not matter.
        labels_b: (k,) integers.

    Returns:
        A number from 0 to 1.

    Raises:
        ArgumentError: If they are not integer vectors of the same length.

    Example:
        >>> import torch
        >>> partition_agreement(torch.tensor([0, 0, 1, 1]), torch.tensor([5, 5, 2, 2]))
        1.0
    """
    a = _as_partition("labels_a", labels_a, None)
    return _agreement(a, _as_partition("labels_b", labels_b, len(a)))


def weighted_modularity(weights: Floats, labels: Labels, resolution: float) -> float:
    """Modularity of a valid graph; 0 if it has no edge, because all its partitions are then equally good."""
    strength = weights.sum(axis=1)
    total = strength.sum()
    if total == 0:
        return 0.0
    communities, labels = np.unique(labels, return_inverse=True)
    members = np.zeros((len(communities), len(labels)))
    members[labels, np.arange(len(labels))] = 1.0
    inside = float(np.einsum("ij,ij->", members @ weights, members))
    return float(inside / total - resolution * np.square(members @ strength / total).sum())


def check_resolution(resolution: Any) -> None:
    """Require a positive finite resolution."""
    check_number("resolution", resolution, "be a positive finite number", lambda value: value > 0)


def check_adjacency(adjacency: Any) -> Floats:
    """The adjacency as a float64 array.

    Raises:
        ArgumentError: If it is not a weighted undirected graph without loops, or has no edge.
    """
    square = isinstance(adjacency, Tensor) and adjacency.ndim == 2 and adjacency.shape[0] == adjacency.shape[1]
    require(square, "adjacency", "be a square tensor of shape (k, k)", adjacency)
    weights: Floats = adjacency.detach().double().cpu().numpy()
    valid = bool(np.isfinite(weights).all() and (weights >= 0).all())
    require(valid, "adjacency", "hold finite weights >= 0", "negative or non-finite ones")
    symmetric = bool((weights == weights.T).all() and not weights.diagonal().any())
    require(symmetric, "adjacency", "be exactly symmetric with a zero diagonal", "one that is not")
    require(bool(weights.any()), "adjacency", "have at least one positive weight", "a graph without edges")
    return weights


def _as_partition(name: str, labels: Any, length: int | None) -> Labels:
    array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else labels
    integers = isinstance(array, np.ndarray) and array.dtype.kind in "iu" and array.ndim == 1 and len(array) > 0
    fits = integers and (length is None or len(array) == length)
    require(fits, name, f"be integers of shape ({'k' if length is None else length},), one per node", labels)
    return np.asarray(array, dtype=np.int64)


def _agreement(a: Labels, b: Labels) -> float:
    # scikit-learn's function gives the same number; for the ten pairs of five runs, its checks took half as long as the
    # detection of communities itself.
    _, a = np.unique(a, return_inverse=True)
    _, b = np.unique(b, return_inverse=True)
    columns = int(b.max()) + 1
    joint = np.bincount(a * columns + b, minlength=(int(a.max()) + 1) * columns).reshape(-1, columns) / len(a)
    entropies = [_entropy(joint.sum(axis)) for axis in (0, 1)]
    if sum(entropies) == 0:  # all nodes are in one community in both
        return 1.0
    shared = sum(entropies) - _entropy(joint.flatten())
    # Rounded, because for equal partitions the sum of logarithms differs from 1 by a few units in the last place.
    return float(np.clip(round(float(2 * shared / sum(entropies)), 12), 0.0, 1.0))


def _entropy(probabilities: Floats) -> float:
    positive = probabilities[probabilities > 0]
    return float(-(positive * np.log(positive)).sum())


def _largest_first(labels: Labels) -> Labels:
    """Number communities by decreasing size, communities of equal size by their first member."""
    _, first, inverse, counts = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), dtype=np.int64)
    rank[np.lexsort((first, -counts))] = np.arange(len(counts))
    return rank[inverse]
