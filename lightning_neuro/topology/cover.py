"""The lens, one number for each point, and the overlapping intervals that cover its values."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_neuro.topology.inputs import check_whole

LENSES = ("l2", "l1", "knn", "pc1")
COVERS = ("uniform", "quantile")
NEIGHBOURS = 5
ROUNDING = 1e-12

Lens = str | Callable[[Tensor], Any]
Values = npt.NDArray[np.float64]


def lens_values(points: Tensor, lens: Lens) -> Values:
    """One number for each of the finite (N, units) points, as float64 (N,).

    `"l2"` and `"l1"` are norms; `"knn"` is the distance to the fifth nearest other point (large where points are
    sparse); `"pc1"` the first principal component, its sign such that its largest loading is positive.

    Raises:
        ValueError: If a lens of the user's own does not give a finite number for each point.
    """
    if callable(lens):
        values = torch.as_tensor(lens(points)).detach().cpu().double().numpy()
        if values.shape != (len(points),) or not np.isfinite(values).all():
            raise ValueError(
                f"lens must give a finite number for each of the {len(points)} points, but gave shape {values.shape}"
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


def intervals_of(values: Values, *, intervals: int, overlap: float, cover: str) -> tuple[Values, Values]:
    """Lower and upper ends of the intervals, both inside them.

    `"uniform"` is KeplerMapper's geometry: centres at equal distances over the range R of the values, half-width
    R / (2 n (1 - overlap)), so that neighbours share `overlap` of their width. `"quantile"` is the same over the ranks
    of the values, so that each interval holds as many points. Intervals that coincide are one; so values that differ by
    rounding alone have a single interval.
    """
    if len(values) == 0:
        return np.zeros(0), np.zeros(0)
    if np.ptp(values) <= ROUNDING * np.abs(values).max():
        return values.min(keepdims=True), values.max(keepdims=True)
    low, high = (values.min(), values.max()) if cover == "uniform" else (0.0, 1.0)
    span = high - low
    inset = (span - ((intervals - 1) / intervals) * span) / 2
    centres = np.linspace(low + inset, high - inset, num=intervals)
    half = span / (2 * intervals * (1 - overlap))
    lower, upper = centres - half, centres + half
    if cover == "quantile":
        lower, upper = (np.quantile(values, ends.clip(0, 1)) for ends in (lower, upper))
    distinct = sorted(set(zip(lower.tolist(), upper.tolist(), strict=True)))
    return np.array([a for a, _ in distinct]), np.array([b for _, b in distinct])


def default_intervals(num_points: int) -> int:
    """The cube root of the number of points, rounded up: 8 for 512, 70 for the 300,000 of the paper's figures."""
    root: float = num_points ** (1 / 3)
    return max(1, math.ceil(round(root, 9)))


def check_cover(lens: Any, intervals: Any, overlap: Any, cover: Any) -> None:
    """Refuse a lens or cover that is none.

    Raises:
        ValueError: Naming the argument.
    """
    if not callable(lens) and lens not in LENSES:
        raise ValueError(f"lens must be one of {', '.join(map(repr, LENSES))} or a function, but it is {lens!r}.")
    if intervals is not None:
        check_whole("intervals", intervals, at_least=1)
    if not isinstance(overlap, (int, float)) or isinstance(overlap, bool) or not 0 <= overlap < 1:
        raise ValueError(f"overlap must be at least 0 and below 1, but it is {overlap!r}.")
    if cover not in COVERS:
        raise ValueError(f"cover must be one of {', '.join(map(repr, COVERS))}, but it is {cover!r}.")
