"""The lens, which maps each point to a number, and the overlapping intervals that cover its values."""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_neuro.checks import ArgumentError
from lightning_neuro.topology.options import Cover, Lens

NEIGHBOURS = 5
ROUNDING = 1e-12

Values = npt.NDArray[np.float64]


def lens_values(points: Tensor, lens: Lens) -> Values:
    """The value of the lens for each point.

    `"l2"` and `"l1"` are norms. `"knn"` is the distance to the fifth nearest other point, which is large where points
    are sparse. `"pc1"` is the first principal component, with the sign that makes its largest loading positive.

    Args:
        points: (N, units), finite.
        lens: Name of the lens, or a function of the points.

    Returns:
        float64 (N,).

    Raises:
        ArgumentError: If a custom lens does not return one finite number for each point.
    """
    if callable(lens):
        values = torch.as_tensor(lens(points)).detach().cpu().double().numpy()
        if values.shape != (len(points),) or not np.isfinite(values).all():
            raise ArgumentError(
                f"`lens` must return one finite number for each of the {len(points)} points; got shape {values.shape}"
                f" with {int((~np.isfinite(values)).sum())} values that are not finite."
            )
        return values
    if len(points) == 0:
        return np.zeros(0)
    if lens == "knn":
        found = _neighbour_distance(points.double())
    elif lens == "pc1":
        found = _first_component(points.double())
    else:
        order = 1 if lens == "l1" else 2
        parts = [torch.linalg.vector_norm(rows.double(), ord=order, dim=1) for rows in torch.split(points, 1024)]
        found = torch.cat(parts)
    result: Values = found.cpu().numpy()
    return result


def _neighbour_distance(x: Tensor) -> Tensor:
    k = min(NEIGHBOURS + 1, len(x))  # the first is the point itself
    parts = [torch.cdist(rows, x).topk(k, largest=False).values[:, -1] for rows in torch.split(x, 1024)]
    return torch.cat(parts)


def _first_component(x: Tensor) -> Tensor:
    centred = x - x.mean(dim=0)
    # The smaller of the two Gram matrices has the same leading direction.
    if centred.shape[1] <= len(centred):
        direction = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
    else:
        direction = centred.T @ torch.linalg.eigh(centred @ centred.T).eigenvectors[:, -1]
        direction = direction / direction.norm().clamp(min=1e-300)
    sign = torch.sign(direction[direction.abs().argmax()])
    return torch.mv(centred, direction) * sign


def cover_intervals(
    values: Values, *, num_intervals: int, overlap_fraction: float, cover: Cover
) -> tuple[Values, Values]:
    """Lower and upper ends of the intervals, both inclusive.

    `"uniform"` is KeplerMapper's geometry: centres at equal distances over the range R of the values and half-width R /
    (2 n (1 - overlap_fraction)), so that neighbours share that fraction of their width. `"quantile"` is the same over
    the ranks of the values, so that each interval holds equally many points. Intervals that coincide are merged; values
    that differ only by rounding have a single interval.

    Args:
        values: float64 (N,), the values of the lens.
        num_intervals: n.
        overlap_fraction: Fraction of its width that an interval shares with the next one.
        cover: `"uniform"` or `"quantile"`.

    Returns:
        Two float64 (intervals,) arrays; at most n intervals.
    """
    if len(values) == 0:
        return np.zeros(0), np.zeros(0)
    if np.ptp(values) <= ROUNDING * np.abs(values).max():
        return values.min(keepdims=True), values.max(keepdims=True)
    low, high = (values.min(), values.max()) if cover == "uniform" else (0.0, 1.0)
    span = high - low
    inset = (span - ((num_intervals - 1) / num_intervals) * span) / 2
    centres = np.linspace(low + inset, high - inset, num=num_intervals)
    half = span / (2 * num_intervals * (1 - overlap_fraction))
    lower, upper = centres - half, centres + half
    if cover == "quantile":
        lower, upper = (np.quantile(values, ends.clip(0, 1)) for ends in (lower, upper))
    distinct = sorted(set(zip(lower.tolist(), upper.tolist(), strict=True)))
    return np.array([a for a, _ in distinct]), np.array([b for _, b in distinct])


def default_num_intervals(num_points: int) -> int:
    """The cube root of the number of points, rounded up: 8 for 512, 67 for 300,000 (the paper's figures use 70)."""
    root: float = num_points ** (1 / 3)
    return max(1, math.ceil(round(root, 9)))
