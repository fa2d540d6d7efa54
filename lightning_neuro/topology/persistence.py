"""Persistent homology of a cloud of points: how it falls together as its points grow, and the loops on the way."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_neuro.topology.distances import Matrix, distance_matrix, pairs_of, scale_of, tree_lengths
from lightning_neuro.topology.inputs import as_points, check_whole, finite_rows

GRID = 64

Bars = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Persistence:
    """The persistence diagrams of a cloud of points; all arrays are float64.

    A bar is a piece (dimension 0) or a loop (dimension 1) that exists from one distance, its birth, to another, its
    death, as points closer than the distance are joined. Measures divide lengths by `scale`, and count a bar that was
    not followed to its end as far as it was seen: so for such a bar they are a lower bound.

    Attributes:
        diagrams: Dimension -> (bars, 2), birth and death as distances; the death of an unfinished loop is infinite.
            The one piece that never dies is left out.
        scale: The .9 quantile of the pairwise distances, 1 where that is 0.
        threshold: The distance up to which loops were followed; infinite without loops to follow.
        num_points: Finite points that dimension 0 rests on.
        num_points_loops: Points that dimension 1 rests on.
        num_nonfinite: Points left out because they held NaN or infinity.
    """

    diagrams: Mapping[int, Bars]
    scale: float
    threshold: float
    num_points: int
    num_points_loops: int
    num_nonfinite: int

    def lengths(self, dimension: int) -> Bars:
        """Scaled lengths of the bars of positive length; unfinished ones as far as they were seen."""
        bars = self.diagrams[dimension]
        lengths = (np.minimum(bars[:, 1], self.threshold) - bars[:, 0]) / self.scale
        result: Bars = lengths[lengths > 0]
        return result

    def unfinished(self, dimension: int = 1) -> int:
        """Bars still alive at the threshold."""
        return int(np.isinf(self.diagrams[dimension][:, 1]).sum())

    def total(self, dimension: int) -> float:
        """Total persistence: the sum of the scaled lengths."""
        return float(self.lengths(dimension).sum())

    def longest(self, dimension: int) -> float:
        """The longest scaled length, 0 without bars."""
        return float(self.lengths(dimension).max(initial=0.0))

    def entropy(self, dimension: int) -> float:
        """Persistent entropy over log2 of the number of bars: 1 for equal lengths, near 0 where one bar has it all.

        0 with fewer than two bars.
        """
        lengths = self.lengths(dimension)
        if len(lengths) < 2:
            return 0.0
        shares = lengths / lengths.sum()
        return float(-(shares * np.log2(shares)).sum() / np.log2(len(shares)))

    def betti_curve(self, dimension: int, distances: Any) -> Bars:
        """How many bars are alive at each of some distances (birth <= distance < death); unscaled distances.

        In dimension 0 the piece that never dies is counted.
        """
        bars = self.diagrams[dimension]
        births, deaths = np.sort(bars[:, 0]), np.sort(bars[:, 1])
        at = np.asarray(distances, dtype=np.float64)
        alive = np.searchsorted(births, at, side="right") - np.searchsorted(deaths, at, side="right")
        result: Bars = alive.astype(np.float64) + (dimension == 0 and self.num_points > 0)
        return result

    def peak(self, dimension: int = 1) -> int:
        """The top of the Betti curve: the largest number of bars alive at once."""
        bars = self.diagrams[dimension]
        return int(self.betti_curve(dimension, bars[:, 0]).max(initial=0))

    def scalars(self) -> dict[str, float]:
        """The diagrams in a few numbers; what is undefined is left out."""
        if self.num_points < 2:
            return {}
        values: dict[str, float] = {"h0_total": self.total(0), "h0_longest": self.longest(0)}
        deaths = self.diagrams[0][:, 1]
        values["h0_half"] = float(np.median(deaths)) / self.scale
        values["h0_entropy"] = self.entropy(0)
        if 1 in self.diagrams:
            values |= {"h1_total": self.total(1), "h1_longest": self.longest(1), "h1_peak": self.peak(1)}
            values |= {"h1_unfinished": self.unfinished(1), "h1_entropy": self.entropy(1)}
        return values

    def notes(self) -> dict[str, str]:
        """What a reader of the numbers must know."""
        notes = {}
        if self.num_nonfinite:
            total = self.num_points + self.num_nonfinite
            notes["nonfinite"] = f"{self.num_nonfinite} of {total} points held NaN or infinity and were left out."
        if self.num_points < 2:
            notes["undefined"] = f"No homology is given: it needs 2 finite points, and there were {self.num_points}."
        return notes


def persistence(points: Any, max_dim: int = 1, max_points: int = 1000, quantile: float = 0.25) -> Persistence:
    """Pieces and loops of a cloud of points, over all distances.

    Pieces (dimension 0) are exact for all points: the edges of a minimum spanning tree, found in a dense (N, N) float64
    matrix. Loops (dimension 1) are found by ripser, in at most `max_points` points and up to a threshold, which leaves
    few bars unfinished; but a loop as large as the whole cloud is one of these: its longest bar is a lower bound.

    Args:
        points: (N, units) NumPy array or tensor. Rows with NaN or infinity are counted and left out.
        max_dim: 1, or 0 for pieces alone.
        max_points: Of more points, loops are looked for among so many, drawn by a private generator.
        quantile: Loops are followed up to this quantile of the pairwise distances; 1 for all distances.

    Returns:
        The diagrams.

    Raises:
        ValueError: For a wrong argument, naming it.

    Source:
        U. Bauer, "Ripser: efficient computation of Vietoris-Rips persistence barcodes", JACT 5 (2021).

    Example:
        >>> import torch
        >>> angle = torch.linspace(0, 6.2832, 41)[:-1]
        >>> circle = torch.stack([angle.cos(), angle.sin()], dim=1)
        >>> found = persistence(circle, quantile=1.0)
        >>> len(found.diagrams[0]), len(found.diagrams[1]), found.unfinished()
        (39, 1, 0)
    """
    check_homology(max_dim, max_points, quantile)
    points = as_points(points)
    finite = finite_rows(points)
    return persistence_of_distances(
        distance_matrix(points[finite]), max_dim, max_points, quantile, num_nonfinite=len(points) - len(finite)
    )


def check_homology(max_dim: Any, max_points: Any, quantile: Any) -> None:
    """Refuse options of `persistence` that are none.

    Raises:
        ValueError: Naming the argument.
    """
    if max_dim not in (0, 1) or isinstance(max_dim, bool):
        raise ValueError(f"max_dim must be 0 or 1, but it is {max_dim!r}.")
    check_whole("max_points", max_points, at_least=2)
    if not isinstance(quantile, (int, float)) or isinstance(quantile, bool) or not 0 < quantile <= 1:
        raise ValueError(f"quantile must be above 0 and at most 1, but it is {quantile!r}.")


def persistence_of_distances(
    distances: Matrix, max_dim: int = 1, max_points: int = 1000, quantile: float = 0.25, *, num_nonfinite: int = 0
) -> Persistence:
    """The same from a symmetric distance matrix with zero diagonal, as `distance_matrix` gives it."""
    n = len(distances)
    lengths = tree_lengths(distances)
    diagrams: dict[int, Bars] = {0: np.stack([np.zeros_like(lengths), lengths], axis=1)}
    threshold, used = float("inf"), 0
    if max_dim == 1:
        chosen = np.sort(np.random.default_rng(0).permutation(n)[:max_points])
        inside = distances if len(chosen) == n else distances[np.ix_(chosen, chosen)]
        diagrams[1], threshold = _loops(inside, quantile)
        used = len(chosen)
    return Persistence(diagrams, scale_of(distances), threshold, n, used, num_nonfinite)


def _loops(distances: Matrix, quantile: float) -> tuple[Bars, float]:
    if len(distances) < 3:
        return np.zeros((0, 2)), float("inf")
    from ripser import ripser  # type: ignore[import-untyped]

    threshold = float(np.quantile(pairs_of(distances), quantile))
    if threshold <= 0:  # most points coincide
        return np.zeros((0, 2)), threshold
    limit = float("inf") if quantile == 1 else threshold
    bars = ripser(distances, maxdim=1, thresh=limit, distance_matrix=True)["dgms"][1]
    return np.asarray(bars, dtype=np.float64).reshape(-1, 2), limit


def topological_drift(a: Any, b: Any) -> float:
    """How far two clouds of the same points differ in how they hang together (RTD-Lite); 0 where they do not.

    Distances are divided by their .9 quantile first. The shortest tree through the points by the smaller of both
    distances is no longer than either's own tree: the drift is how much longer those are, on average. It grows with the
    number of points, up to their number times the scale.

    Args:
        a: (N, units) NumPy array or tensor.
        b: (N, other units), the same points in another layer or at another time.

    Returns:
        The mean of (tree of a) - (tree of both) and (tree of b) - (tree of both). Points that are not finite in one of
        the clouds are left out of both.

    Raises:
        ValueError: If the clouds do not have the same number of points, or fewer than 2 finite ones.

    Source:
        RTD-Lite: E. Tulchinskii et al. (2025), after S. Barannikov et al., "Representation Topology Divergence",
        arXiv 2201.00058 (ICML 2022).

    Example:
        >>> import torch
        >>> cloud = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> round(topological_drift(cloud, 7 * cloud), 6)
        0.0
    """
    a, b = as_points(a, "a"), as_points(b, "b")
    if len(a) != len(b):
        raise ValueError(f"a and b must hold the same points, but a has {len(a)} and b has {len(b)}.")
    finite = a.isfinite().all(dim=1).cpu() & b.isfinite().all(dim=1).cpu()
    if finite.sum() < 2:
        raise ValueError(f"a and b must share at least 2 finite points, but share {int(finite.sum())}.")
    return drift_of_distances(*(scaled(distance_matrix(points[finite.to(points.device)])) for points in (a, b)))


def scaled(distances: Matrix) -> Matrix:
    """Distances divided by their .9 quantile."""
    result: Matrix = distances / scale_of(distances)
    return result


def drift_of_distances(a: Matrix, b: Matrix) -> float:
    """The drift of two scaled distance matrices of the same points."""
    both = tree_lengths(np.minimum(a, b)).sum()
    return float(max(0.0, (tree_lengths(a).sum() + tree_lengths(b).sum()) / 2 - both))


def condensed(distances: Matrix) -> Tensor:
    """The pairs of a symmetric matrix as a float32 vector, half the size and fit for a checkpoint."""
    return torch.from_numpy(pairs_of(distances)).float()


def expanded(pairs: Tensor) -> Matrix:
    """The matrix of `condensed`."""
    n = round((1 + np.sqrt(1 + 8 * len(pairs))) / 2)
    matrix = np.zeros((n, n))
    matrix[np.triu_indices(n, 1)] = pairs.double().numpy()
    return matrix + matrix.T
