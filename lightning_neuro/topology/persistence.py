"""Persistent homology of a cloud of points: its connected components and loops over all distances."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_neuro.checks import ArrayLike, as_activations, check_int, check_number, finite_rows, require
from lightning_neuro.topology.distances import Matrix, Pairs, distance_matrix, pairs_of, scale_of, tree_lengths

Bars = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Persistence:
    """The persistence diagrams of a cloud of points; all arrays are float64.

    A bar is a connected component (dimension 0) or a loop (dimension 1) that exists from one distance, its birth, to
    another, its death, as points closer than the distance are joined. Measures divide lengths by `scale`. A loop that
    was not followed to its death has an infinite death; in the measures its bar ends at `threshold`, so they are lower
    bounds.

    Attributes:
        diagrams: Dimension -> (bars, 2), birth and death as distances; the death of an unfinished loop is infinite.
            The component that never dies is left out.
        scale: The .9 quantile of the pairwise distances, 1 if it is 0.
        threshold: The distance up to which loops were followed; infinite if there was nothing to follow.
        num_points: Number of finite points, on which dimension 0 is computed.
        num_points_loops: Number of points on which dimension 1 is computed.
        num_nonfinite: Number of points left out because of NaN or infinite values.
    """

    diagrams: Mapping[int, Bars]
    scale: float
    threshold: float
    num_points: int
    num_points_loops: int
    num_nonfinite: int

    def lengths(self, dimension: int) -> Bars:
        """Scaled lengths of the bars of positive length; unfinished ones up to the threshold."""
        bars = self.diagrams[dimension]
        lengths = (np.minimum(bars[:, 1], self.threshold) - bars[:, 0]) / self.scale
        result: Bars = lengths[lengths > 0]
        return result

    def unfinished(self, dimension: int = 1) -> int:
        """Number of bars still alive at the threshold."""
        return int(np.isinf(self.diagrams[dimension][:, 1]).sum())

    def total(self, dimension: int) -> float:
        """Total persistence: the sum of the scaled lengths."""
        return float(self.lengths(dimension).sum())

    def longest(self, dimension: int) -> float:
        """The largest scaled length, 0 without bars."""
        return float(self.lengths(dimension).max(initial=0.0))

    def entropy(self, dimension: int) -> float:
        """Persistent entropy divided by log2 of the number of bars: 1 for equal lengths, near 0 if one bar dominates.

        Args:
            dimension: 0 or 1.

        Returns:
            A number from 0 to 1; 0 with fewer than two bars.
        """
        lengths = self.lengths(dimension)
        if len(lengths) < 2:
            return 0.0
        shares = lengths / lengths.sum()
        return float(-(shares * np.log2(shares)).sum() / np.log2(len(shares)))

    def betti_curve(self, dimension: int, distances: Any) -> Bars:
        """Number of bars alive (birth <= distance < death) at each of some unscaled distances.

        In dimension 0 the component that never dies is counted.

        Args:
            dimension: 0 or 1.
            distances: (n,) numbers.

        Returns:
            float64 (n,).
        """
        bars = self.diagrams[dimension]
        births, deaths = np.sort(bars[:, 0]), np.sort(bars[:, 1])
        at = np.asarray(distances, dtype=np.float64)
        alive = np.searchsorted(births, at, side="right") - np.searchsorted(deaths, at, side="right")
        result: Bars = alive.astype(np.float64) + (dimension == 0 and self.num_points > 0)
        return result

    def peak(self, dimension: int = 1) -> int:
        """The maximum of the Betti curve: the largest number of bars alive at once."""
        bars = self.diagrams[dimension]
        return int(self.betti_curve(dimension, bars[:, 0]).max(initial=0))

    def scalars(self) -> dict[str, float]:
        """Measure -> value; undefined measures are left out."""
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

    def why_undefined(self) -> str:
        """Why there are no measures; empty if there are some."""
        if self.num_points >= 2:
            return ""
        return f"Persistent homology is undefined, because it needs at least 2 finite points; got {self.num_points}."


def compute_persistence(
    points: ArrayLike, max_dim: int = 1, max_points: int = 1000, quantile: float = 0.25
) -> Persistence:
    """Compute the persistent homology of a cloud of points in dimensions 0 (connected components) and 1 (loops).

    Components are exact for all points: they are the edges of a minimum spanning tree of the dense (N, N) distance
    matrix. Loops are found by ripser, in at most `max_points` points and up to a threshold that leaves few bars
    unfinished. A loop as large as the whole cloud is usually unfinished, so the length of its bar is a lower bound.

    Args:
        points: (N, units) NumPy array or tensor. Rows with NaN or infinite values are counted and left out.
        max_dim: 1, or 0 for components alone.
        max_points: Maximum number of points for loops; if there are more, a fixed random choice is used.
        quantile: Loops are followed up to this quantile of the pairwise distances; 1 for all distances.

    Returns:
        The diagrams.

    Raises:
        ArgumentError: If an argument is invalid; the message names it.

    Source:
        U. Bauer, "Ripser: efficient computation of Vietoris-Rips persistence barcodes", JACT 5 (2021).

    Example:
        >>> import torch
        >>> angle = torch.linspace(0, 6.2832, 41)[:-1]
        >>> circle = torch.stack([angle.cos(), angle.sin()], dim=1)
        >>> found = compute_persistence(circle, quantile=1.0)
        >>> len(found.diagrams[0]), len(found.diagrams[1]), found.unfinished()
        (39, 1, 0)
    """
    require(max_dim in (0, 1) and not isinstance(max_dim, bool), "max_dim", "be 0 or 1", max_dim)
    check_int("max_points", max_points, minimum=2)
    check_number("quantile", quantile, "be a number above 0 and at most 1", lambda value: 0 < value <= 1)
    points = as_activations(points, name="points")
    finite = finite_rows(points)
    return persistence_of_distances(
        distance_matrix(points[finite]), max_dim, max_points, quantile, num_nonfinite=int((~finite).sum())
    )


def persistence_of_distances(
    distances: Matrix, max_dim: int = 1, max_points: int = 1000, quantile: float = 0.25, *, num_nonfinite: int = 0
) -> Persistence:
    """The persistent homology of a symmetric distance matrix with zero diagonal; see `compute_persistence`."""
    n = len(distances)
    pairs = pairs_of(distances)
    lengths = tree_lengths(pairs)
    diagrams: dict[int, Bars] = {0: np.stack([np.zeros_like(lengths), lengths], axis=1)}
    threshold, used = float("inf"), 0
    if max_dim == 1:
        chosen = np.sort(np.random.default_rng(0).permutation(n)[:max_points])
        used = len(chosen)
        inside = distances if used == n else distances[np.ix_(chosen, chosen)]
        diagrams[1], threshold = _loops(inside, pairs if used == n else pairs_of(inside), quantile)
    return Persistence(diagrams, scale_of(pairs), threshold, n, used, num_nonfinite)


def _loops(distances: Matrix, pairs: Pairs, quantile: float) -> tuple[Bars, float]:
    if len(distances) < 3:
        return np.zeros((0, 2)), float("inf")
    from ripser import ripser  # type: ignore[import-untyped]

    threshold = float(np.quantile(pairs, quantile))
    if threshold <= 0:  # most points coincide
        return np.zeros((0, 2)), threshold
    limit = float("inf") if quantile == 1 else threshold
    bars = ripser(distances, maxdim=1, thresh=limit, distance_matrix=True)["dgms"][1]
    return np.asarray(bars, dtype=np.float64).reshape(-1, 2), limit
